"""Random rows of token shards -> microseconds each, beside a copy, Grain and Hugging Face's arrow files.

`python -m moe.bench.loading` makes documents of random ids, with lengths like text, in a temporary folder and reads the
same number of rows of it in random order by every way, one way after the other, round by round. Each row is two int64
tensors at the end; the time is that of the processor, the reading thread's included. Then it times how long a run waits
for its first batch at step 0 and at step 1,000,000 (`moe.bench.opening`), where the batch is checked too.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import StringIO
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from moe import figures, log
from moe.bench.opening import Opening, openings
from moe.bench.opening import table as openings_table
from moe.data.loader import train_batches, training_rows
from moe.data.packing import pack
from moe.data.rows import PackedRows
from moe.data.shards import (
    MANIFEST_NAME,
    Manifest,
    PairWriter,
    ShardFacts,
    SplitFacts,
    TokenData,
    TokenizerFacts,
)
from moe.errors import clean_exit

VOCABULARY, BATCH, LARGEST_COPY = 32_000, 8, 50_000_000


@dataclass(frozen=True)
class Line:
    """What one way took."""

    name: str
    microseconds: float
    """Of the processor a row, the median of rounds."""
    low: float
    high: float
    """The quartiles."""
    ratio: float
    """To the copy: the median of rounds."""


@dataclass(frozen=True)
class Report:
    """All ways, what packing took, and opening."""

    lines: list[Line]
    packed_documents_per_second: float
    padding: float
    cut_end_to_end: float
    """Share of the documents that would fit a row, and are cut where they lie end to end."""
    documents: int
    openings: list[Opening]


def compare(folder: Path, length: int, tokens: int, rows: int, rounds: int) -> Report:
    """Make the data in `folder` and read it by every way."""
    data, length_D = _data(folder / "ours", tokens, 0)
    other, _ = _data(folder / "other", tokens, 1)
    ways = _ways(data, folder, length, rows)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            way()
            times[name].append((time.process_time() - began) / rows * 1e6)
    base = times["copy + int64"]
    lines = [
        Line(
            name,
            median(found),
            float(np.percentile(found, 25)),
            float(np.percentile(found, 75)),
            median(one / other for one, other in zip(found, base, strict=True)),
        )
        for name, found in times.items()
    ]
    began = time.process_time()
    pieces = pack(length_D, length, 0)
    seconds = time.process_time() - began
    end_D = np.cumsum(length_D)
    across = (end_D - length_D) // length != (end_D - 1) // length
    whole = length_D <= length
    return Report(
        lines,
        len(length_D) / seconds,
        1 - float(length_D.sum()) / (pieces.num_rows * length),
        float((across & whole).sum() / whole.sum()),
        len(length_D),
        openings((data.folder, other.folder), length, rounds),
    )


def _ways(data: TokenData, folder: Path, length: int, rows: int) -> dict[str, Callable[[], None]]:
    end_to_end = training_rows(data, length, "concatenate", apart=False, seed=0)
    packed = training_rows(data, length, "best_fit", apart=True, seed=0)
    order = np.random.default_rng(0).integers(min(len(end_to_end), len(packed)) - 1, size=rows).tolist()
    plain = np.array(data.tokens("train", 0, min(len(end_to_end) * length - length, LARGEST_COPY)))
    block = plain[: len(plain) // (length + 1) * (length + 1)].reshape(-1, length + 1)

    def copy() -> None:
        for number in order:
            row = torch.from_numpy(block[number % len(block)].astype(np.int64))
            row[:-1], row[1:]

    def direct(source: Any) -> Callable[[], None]:
        def read() -> None:
            for number in order:
                row = source[number]
                torch.from_numpy(row.ids_S), torch.from_numpy(row.labels_S)

        return read

    def blocks() -> None:
        assert isinstance(packed, PackedRows)
        for at in range(0, rows, BATCH):
            block = packed.block(order[at : at + BATCH])
            torch.from_numpy(block.ids_BS), torch.from_numpy(block.labels_BS)

    def batches(packing: Any, attend: bool) -> Callable[[], None]:
        def read() -> None:
            steps: Iterator[Any] = train_batches(
                data,
                sequence_length=length,
                global_batch_size=BATCH,
                micro_batch_size=BATCH,
                rank=0,
                world_size=1,
                seed=0,
                start_step=0,
                packing=packing,
                attend_across_documents=attend,
            )
            for _ in islice(steps, rows // BATCH):
                pass
            steps.close()  # type: ignore[attr-defined]  # a generator

        return read

    return {
        "copy + int64": copy,
        "end to end": direct(end_to_end),
        "best fit, documents apart": blocks,
        "end to end, batches through Grain": batches("concatenate", True),
        "best fit, apart, batches through Grain": batches("best_fit", False),
        f"Grain {version('grain')} alone": _grain_alone(block, rows),
        f"Hugging Face arrow {version('datasets')}": _arrow(folder / "arrow", block, order),
    }


def _grain_alone(block: npt.NDArray[Any], rows: int) -> Callable[[], None]:
    import grain

    source = grain.MapDataset.source(range(len(block))).shuffle(seed=0).repeat()
    source = source.map(lambda number: torch.from_numpy(block[number].astype(np.int64)))

    def read() -> None:
        for _ in islice(iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1))), rows):
            pass

    return read


def _arrow(folder: Path, block: npt.NDArray[Any], order: list[int]) -> Callable[[], None]:
    import datasets

    with redirect_stderr(StringIO()):  # its progress bars
        datasets.Dataset.from_dict({"input_ids": list(block)}).save_to_disk(str(folder))
    saved = datasets.load_from_disk(str(folder)).with_format("arrow")

    def read() -> None:
        for number in order:
            column = saved[number % len(block)].column(0).chunk(0)
            row = torch.from_numpy(column.flatten().to_numpy().astype(np.int64))
            row[:-1], row[1:]

    return read


def _data(folder: Path, tokens: int, seed: int) -> tuple[TokenData, npt.NDArray[np.int64]]:
    """Random ids in documents with lengths like those of text: log-normal, the mean some 1,100 tokens."""
    draw = np.random.default_rng(seed)
    lengths = draw.lognormal(6.3, 1.2, tokens // 1000).clip(1, 200_000).astype(np.int64)
    folder.mkdir(parents=True)
    writer = PairWriter(folder / "train-00000", "uint16")
    for length in lengths.tolist():
        writer.add(draw.integers(2, VOCABULARY, length, dtype=np.uint16))
    stamps, total = writer.close(), int(lengths.sum())
    shard = ShardFacts(name="train-00000", documents=len(lengths), tokens=total, bin=stamps[0], idx=stamps[1])
    facts = SplitFacts(documents=len(lengths), tokens=total, bytes=total, shards=[shard])
    tokenizer = TokenizerFacts(vocab_size=VOCABULARY, eos_id=0, pad_id=1, files={})
    manifest = Manifest(recipe={}, dtype="uint16", tokenizer=tokenizer, splits={"train": facts}, sources=[])
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return TokenData.open(folder, verify=False), lengths


def _table(report: Report, length: int) -> Table:
    page = Table(title=f"Rows of {length} tokens in random order, processor time")
    for name in ("", "us a row", "quartiles", "/ copy", "million tokens/s"):
        page.add_column(name, justify="left" if not name else "right")
    for line in report.lines:
        page.add_row(
            line.name,
            f"{line.microseconds:.2f}",
            f"{line.low:.2f}-{line.high:.2f}",
            f"{line.ratio:.2f}",
            f"{length / line.microseconds:.0f}",
        )
    return page


@click.command("loading")
@click.option(
    "--length", type=click.IntRange(min=2), default=4096, show_default=True, help="Tokens of a row."
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1_000_000),
    default=50_000_000,
    show_default=True,
    help=f"Of a source; the copy, Grain alone and arrow files get {LARGEST_COPY:,} at most.",
)
@click.option(
    "--rows", type=click.IntRange(min=BATCH), default=2000, show_default=True, help="Read in a round."
)
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the figures to this file too."
)
def command(length: int, tokens: int, rows: int, rounds: int, json_path: Path | None) -> None:
    """Time the reading of random rows, end to end and packed, beside a copy, Grain and arrow files."""
    log.setup()
    with clean_exit():
        if json_path is not None:
            figures.check_place(json_path)
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(prefix="turnout-loading-") as folder:
            report = compare(Path(folder), length, tokens, rows, rounds)
        Console(width=120).print(_table(report, length), openings_table(report.openings, report.documents))
        click.echo(
            f"packing: {report.packed_documents_per_second:,.0f} documents/s, {report.padding:.4%} padding; end to end "
            f"{report.cut_end_to_end:.1%} of the documents that would fit a row are cut, packed none"
        )
        if json_path is not None:
            figures.write(json_path, json.dumps(asdict(report), indent=2) + "\n")


if __name__ == "__main__":
    command()
