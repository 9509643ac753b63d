"""Every rank's part of a state -> checkpoints/step_N, complete or not there at all; no engine needed."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

from torch import Tensor

from moe.attempt import check_owner, still_owner
from moe.checkpoint import certificate, guarded, retention, tensors
from moe.checkpoint import folder as folders
from moe.checkpoint.folder import File, Layout, Manifest, Saved
from moe.config import RunConfig
from moe.dist import Ranks
from moe.errors import CheckpointError
from moe.recipe import dump

T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of the state after a step, in memory that training leaves alone until it is written."""

    step: int
    tokens: int
    data_fingerprint: str
    tensors: dict[str, Tensor]
    """By key; all ranks' together are the whole state."""
    rng: dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """What a rank has written."""

    files: dict[str, File]
    tensors: dict[str, Saved]


def write(run: RunConfig, mine: Snapshot, ranks: Ranks) -> Manifest:
    """Write checkpoints/step_N. Collective on the control group alone.

    Every rank writes its part into a folder with another name; the manifest comes last, everything is synced,
    and one rename makes it a checkpoint. Raises `CheckpointError` on all ranks if any could not write; nothing
    of this step is left then.
    """
    target = folders.step_folder(run.folder, mine.step)
    torn = folders.torn(target)
    try:
        _together(ranks, torn, lambda: _owned(run, lambda: begin(torn) if ranks.speaks else None))
        parts = _together(
            ranks, torn, lambda: _owned(run, lambda: write_part(torn, ranks.rank, mine.tensors, mine.rng))
        )
        blank = Manifest(
            step=mine.step,
            next_sample=mine.step * run.train.global_batch_size,
            tokens=mine.tokens,
            layout=Layout.of(run, ranks.world_size),
            data_fingerprint=mine.data_fingerprint,
            files={},
            tensors={},
        )
        manifest = filled(blank, run, parts)
        _together(
            ranks, torn, lambda: _owned(run, lambda: _finish(run, manifest, torn) if ranks.speaks else None)
        )
    except CheckpointError:
        if ranks.speaks and still_owner(
            run.folder
        ):  # all ranks have stopped writing, and the room may be wanted
            shutil.rmtree(torn, ignore_errors=True)
        raise
    return manifest


def begin(torn: Path) -> None:
    """Sweep away what killed saves left, and make room for this one."""
    torn.parent.mkdir(parents=True, exist_ok=True)
    retention.sweep(torn.parent)
    torn.mkdir()


def write_part(folder: Path, rank: int, state: dict[str, Tensor], rng: dict[str, Tensor]) -> Part:
    """The files of one rank."""
    files: dict[str, File] = {}
    saved: dict[str, Saved] = {}
    if state:
        name = f"state-{rank:05d}.safetensors"
        files[name], saved = tensors.write(folder / name, state)
    if rng:
        name = f"rng-{rank:05d}.safetensors"
        files[name], _ = tensors.write(folder / name, rng)
    return Part(files, saved)


def filled(manifest: Manifest, run: RunConfig, parts: list[Part]) -> Manifest:
    """With the files and tensors of all parts, and the recipe that `seal` will write."""
    files = {name: file for part in parts for name, file in part.files.items()}
    page = dump(run).encode()
    files["recipe.yaml"] = File(len(page), folders.hash_bytes(page))
    saved = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    return replace(manifest, files=files, tensors=saved)


def seal(run: RunConfig, manifest: Manifest, torn: Path) -> None:
    """Write the recipe, the run's certificate if it has one and, last, the manifest; then only the name is missing."""
    with (torn / "recipe.yaml").open("wb") as file:
        file.write(dump(run).encode())
        file.flush()
        os.fsync(file.fileno())
    files = manifest.files | certificate.add(run, torn)
    folders.write_manifest(torn, replace(manifest, files=files))
    sync(torn)


def sync(folder: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _owned(run: RunConfig, work: Callable[[], T]) -> T:
    check_owner(run.folder)
    return work()


def _finish(run: RunConfig, manifest: Manifest, torn: Path) -> None:
    seal(run, manifest, torn)
    torn.rename(folders.step_folder(run.folder, manifest.step))
    sync(torn.parent)
    keep, every = run.checkpoint.keep, run.checkpoint.keep_every
    if keep is not None:
        good = guarded.last_good(run.folder, manifest.step) if run.train.guard.then == "roll_back" else None
        surplus = retention.surplus(folders.steps(run.folder), keep, every)
        retention.remove(run.folder, [step for step in surplus if step != good])


def _together(ranks: Ranks, folder: Path, work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank and wait for all; what one could not write is an error on every rank."""
    done: T | None = None
    fault = ""
    try:
        done = work()
    except (OSError, CheckpointError) as error:
        fault = f"rank {ranks.rank} could not write to {folder}: {getattr(error, 'strerror', None) or error}"
    faults = [said for said in ranks.gather(fault) if said]
    if faults:
        raise CheckpointError(
            f"{'; '.join(faults)}. Make room or give access; earlier checkpoints are as they were."
        )
    return ranks.gather(cast("T", done))
