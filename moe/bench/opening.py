"""Folders of shards -> how long a run waits for its first batch, at its beginning and far into it, by the clock.

What training does is timed: manifests read, shards mapped, the rows of an epoch laid out, and the reading thread asked
for the step's batches. Python's modules are imported before, and the files are in memory.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from rich.table import Table

from moe.data.loader import Batch, train_batches
from moe.data.mixture import Mixture, Stage
from moe.data.rows import Packing
from moe.data.shards import TokenData
from moe.errors import DataError

FAR, WORLD, MICRO_BATCH = 1_000_000, 8, 8
_BEFORE = 2
"""Steps by which the loader that checks begins earlier."""


@dataclass(frozen=True)
class Way:
    """Settings of a recipe's data section."""

    folders: tuple[Path, ...]
    packing: Packing
    apart: bool
    mixture: Mixture | None = None

    def batches(self, length: int, rank: int, world_size: int, step: int) -> Iterator[tuple[Batch, ...]]:
        """Opened anew, nothing kept from before but files."""
        return train_batches(
            [TokenData.open(folder, verify=False) for folder in self.folders],
            sequence_length=length,
            global_batch_size=WORLD * MICRO_BATCH,
            micro_batch_size=MICRO_BATCH,
            rank=rank,
            world_size=world_size,
            seed=0,
            start_step=step,
            packing=self.packing,
            attend_across_documents=not self.apart,
            mixture=self.mixture,
        )

    def forget(self) -> None:
        """Remove the packed rows beside the shards."""
        for folder in self.folders:
            shutil.rmtree(folder / ".packing", ignore_errors=True)


@dataclass(frozen=True)
class Opening:
    """Seconds until the first batch, the median of rounds."""

    name: str
    world_size: int
    """The last of so many ranks."""
    begin: float
    """At step 0."""
    far: float
    """At step `FAR`."""
    slowest: float
    """Of the rounds at `FAR`."""


def ways(folders: tuple[Path, Path]) -> Mapping[str, Way]:
    """What is timed, by name; the mixture has two stages, whose bound lies before `FAR`."""
    stages = (Stage(0, (0.7, 0.3)), Stage(FAR // 2 * WORLD * MICRO_BATCH, (0.2, 0.8)))
    one = folders[:1]
    return {
        "end to end": Way(one, "concatenate", apart=False),
        "end to end, documents apart": Way(one, "concatenate", apart=True),
        "best fit, documents apart": Way(one, "best_fit", apart=True),
        "mixture of two, best fit, apart": Way(folders, "best_fit", True, Mixture(stages)),
    }


def openings(folders: tuple[Path, Path], length: int, rounds: int) -> list[Opening]:
    """Time every way; packed ones with the rows found beside the shards, and packed anew. Leaves no packed rows.

    Raises `DataError` if a batch is not that of its step.
    """
    found = []
    for name, way in ways(folders).items():
        for world_size in (1, WORLD):
            rank = world_size - 1
            _check(name, way, length, rank, world_size)
            found.append(_timed(name, way, length, rank, world_size, rounds, anew=False))
            if way.packing == "best_fit":
                again = f"{name}, packed anew"
                found.append(_timed(again, way, length, rank, world_size, rounds, anew=True))
        way.forget()
    return found


def _timed(
    name: str, way: Way, length: int, rank: int, world_size: int, rounds: int, *, anew: bool
) -> Opening:
    taken: dict[int, list[float]] = {0: [], FAR: []}
    for _ in range(rounds):
        for step, times in taken.items():
            if anew:
                way.forget()
            began = time.perf_counter()
            batches = way.batches(length, rank, world_size, step)
            next(batches)
            times.append(time.perf_counter() - began)
            batches.close()  # type: ignore[attr-defined]  # a generator
    return Opening(name, world_size, median(taken[0]), median(taken[FAR]), max(taken[FAR]))


def _check(name: str, way: Way, length: int, rank: int, world_size: int) -> None:
    """The batch at `FAR` is the rank's share of what a rank alone reads there when it comes from earlier steps."""
    share = WORLD // world_size
    here = _read(way, length, rank, world_size, FAR, 0)
    expected = _read(way, length, 0, 1, FAR - _BEFORE, _BEFORE)[rank * share : (rank + 1) * share]
    same = len(here) == len(expected) and all(_equal(*pair) for pair in zip(here, expected, strict=True))
    if not same or _equal(here[0], _read(way, length, rank, world_size, FAR - 1, 0)[0]):
        raise DataError(
            f"{name}: rank {rank} of {world_size} opened at step {FAR} does not get the batches that a run without "
            f"a break has there. Its checkpoints cannot be gone on from: report it."
        )


def _read(way: Way, length: int, rank: int, world_size: int, start: int, after: int) -> tuple[Batch, ...]:
    with closing(way.batches(length, rank, world_size, start)) as batches:  # type: ignore[type-var]  # a generator
        return next(islice(batches, after, None))


def _equal(one: Batch, other: Batch) -> bool:
    pairs = [(one.input_ids_BS, other.input_ids_BS), (one.labels_BS, other.labels_BS)]
    if one.documents_BS is not None and other.documents_BS is not None:
        pairs.append((one.documents_BS, other.documents_BS))
    elif one.documents_BS is not other.documents_BS:
        return False
    return all(torch.equal(mine, its) for mine, its in pairs)


def table(found: list[Opening], documents: int) -> Table:
    """For the screen."""
    page = Table(title=f"Until the first batch, of {documents:,} documents a source, by the clock")
    for name in ("", "rank", "step 0, ms", f"step {FAR:,}, ms", "slowest"):
        page.add_column(name, justify="left" if not name else "right")
    for line in found:
        page.add_row(
            line.name,
            f"{line.world_size - 1} of {line.world_size}",
            f"{1e3 * line.begin:.1f}",
            f"{1e3 * line.far:.1f}",
            f"{1e3 * line.slowest:.1f}",
        )
    return page
