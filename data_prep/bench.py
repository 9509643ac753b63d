"""Preparation beside its peers: encoding and near duplicates, interleaved, each in a process of its own.

`python -m data_prep.bench encode --megabytes 200 --json encode.json`. The text is the .py, .md, .rst and .txt files of
the installed packages, or of --text; every contender sees it once a run, since caches flatter what is read twice. Slow
contenders get a tenth of it. Megabytes are 10^6 bytes of UTF-8; CPU seconds are those of all processes together.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from data_prep import corpus, peers, vocabulary
from data_prep.contenders import ENCODE, MEMORY, NEAR, Contender
from data_prep.encoder import Encoder
from data_prep.recipe import ExistingTokenizer
from moe import log
from moe.errors import DataError, clean_exit

_LIBRARIES = (
    "gigatoken",
    "tokenizers",
    "datasets",
    "datatrove",
    "rensa",
    "spacy",
    "megatron-core",
    "pyarrow",
    "numpy",
)
_COPIES = 4


@click.group()
def command() -> None:
    """Measure preparation beside its peers."""


def _options(function: Any) -> Any:
    for option in (
        click.option("--megabytes", type=click.IntRange(1), default=100, show_default=True),
        click.option("--rounds", type=click.IntRange(1), default=3, show_default=True),
        click.option("--workers", type=click.IntRange(1), default=2, show_default=True),
        click.option("--text", type=click.Path(path_type=Path), help="A folder of text instead."),
        click.option("--json", "page", type=click.Path(path_type=Path), help="Write the figures here too."),
    ):
        function = option(function)
    return function


@command.command()
@_options
def encode(**options: Any) -> None:
    """JSON lines on the disk to files of tokens."""
    _bench(ENCODE, **options)


@command.command()
@_options
def near(**options: Any) -> None:
    """Documents to the signatures by which near duplicates are found."""
    _bench(NEAR, **options)


@command.command()
@click.option("--megabytes", type=click.IntRange(1), default=100, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True)
@click.option("--text", type=click.Path(path_type=Path), help="A folder of text instead.")
def agree(megabytes: int, workers: int, text: Path | None) -> None:
    """Count the tokens in which gigatoken and `tokenizers` agree; stop at the first in which they do not."""
    log.setup()
    with clean_exit(), tempfile.TemporaryDirectory() as place:
        files = corpus.make(Path(place), text or Path(sysconfig.get_path("purelib")), megabytes, workers)
        folder = corpus.tokenizer(Path(place), files)
        tokens = documents = 0
        with get_context("spawn").Pool(workers) as pool:
            for more in pool.imap(partial(_agree, folder=folder), files):
                tokens, documents = tokens + more[0], documents + more[1]
        click.echo(f"gigatoken = tokenizers: {tokens:,} tokens of {documents:,} documents")


def _agree(path: Path, folder: Path) -> tuple[int, int]:
    """Equal tokens of a file, and its documents."""
    known = vocabulary.load(ExistingTokenizer(type="file", path=str(folder)))
    ways = Encoder(known), Encoder(known, fast=False)
    if ways[0].name == ways[1].name:
        raise DataError(
            "there is nothing to compare: gigatoken is not in use here. Install it: pip install 'turnout[data]'."
        )
    tokens = documents = 0
    for batch in peers.lines(path):
        one, other = (way.encode([text.encode() for text in batch]) for way in ways)
        if not (np.array_equal(one.ids_N, other.ids_N) and np.array_equal(one.lengths_D, other.lengths_D)):
            raise DataError(
                f"{ways[0].name} and {ways[1].name} differ in one of {len(batch)} documents after {tokens:,} "
                f"equal tokens of a file: {_different(batch, ways)!r:.200}. Set tokenizer.fast=false for such text."
            )
        tokens, documents = tokens + len(one.ids_N), documents + len(batch)
    return tokens, documents


@command.command(hidden=True)
@click.argument("name")
@click.argument("tokenizer", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("workers", type=int)
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
def one(name: str, tokenizer: Path, folder: Path, workers: int, files: tuple[Path, ...]) -> None:
    """Run one contender and print its seconds."""
    began = time.perf_counter()
    with clean_exit():
        {**ENCODE, **NEAR, **MEMORY}[name].run(files, tokenizer, folder, workers)
    wall = time.perf_counter() - began
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    figures = {
        "wall": wall,
        "cpu": sum(use.ru_utime + use.ru_stime for use in uses),
        "peak": max(_peak_bytes(), uses[1].ru_maxrss << 10),
    }
    click.echo(json.dumps(figures))


@command.command()
@click.option("--megabytes", type=click.IntRange(1), default=10, show_default=True, help="Of different text.")
@click.option("--times", type=click.IntRange(2), default=8, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True)
@click.option("--text", type=click.Path(path_type=Path), help="A folder of text instead.")
def memory(megabytes: int, times: int, workers: int, text: Path | None) -> None:
    """The most memory that a process of `turnout prepare` holds, for so much text and for some times as much of it."""
    log.setup()
    with clean_exit(), tempfile.TemporaryDirectory() as place:
        for name in (name for name, way in MEMORY.items() if all(map(find_spec, way.needs))):
            for size, peak in growth(Path(place) / name, name, megabytes, times, workers, text):
                click.echo(f"{name}: {size / 1e6:4.0f} MB of text, {peak / 2**20:4.0f} MiB")


def growth(
    place: Path, name: str, megabytes: int, times: int, workers: int, text: Path | None = None
) -> list[tuple[int, float]]:
    """Of a way in `MEMORY`: bytes of text, and of its largest process; for some copies of each document, and for more.

    Copies differ by a number, and their lengths are the same: a long document takes its memory, however many there are.
    Of some copies every worker meets one: what it remembers of words is then as much as it is of more of them.
    """
    found = []
    for copies in (_COPIES, _COPIES * times):
        here = place / str(copies)
        here.mkdir(parents=True)
        root = text or Path(sysconfig.get_path("purelib"))
        files = corpus.make(here, root, megabytes, workers, copies=copies)
        peak = _child(name, corpus.tokenizer(here, files), here / "made", workers, files)["peak"]
        found.append((corpus.num_bytes(files), peak))
    return found


def _bench(
    contenders: dict[str, Contender],
    megabytes: int,
    rounds: int,
    workers: int,
    text: Path | None,
    page: Path | None,
) -> None:
    log.setup()
    with clean_exit(), tempfile.TemporaryDirectory() as place:
        files = corpus.make(Path(place), text or Path(sysconfig.get_path("purelib")), megabytes, workers)
        tokenizer = corpus.tokenizer(Path(place), files)
        here = {
            name: contender
            for name, contender in contenders.items()
            if all(find_spec(package) for package in contender.needs)
        }
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in here}
        for number in range(rounds):
            for place_of, (name, contender) in enumerate(here.items()):
                mine = files[:workers] if contender.is_slow else files
                found = _child(name, tokenizer, Path(place) / f"{number}-{place_of}", workers, mine)
                size = corpus.num_bytes(mine) / 1e6
                runs[name].append({**found, "MB": size})
                log.get().info("round %d, %s: %.1f MB in %.1f s", number + 1, name, size, found["wall"])
    figures = {
        "rows": {name: _medians(found) for name, found in runs.items()},
        "left out": sorted(set(contenders) - set(here)),
        "workers": workers,
        "rounds": rounds,
        "versions": {name: _version(name) for name in _LIBRARIES},
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }
    _print(figures)
    if page:
        page.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _different(texts: Sequence[str], ways: Sequence[Encoder]) -> str:
    """The first text of which they make different tokens."""
    made = ([way.encode([text.encode()]).ids_N for way in ways] for text in texts)
    return next(
        text for text, (one, other) in zip(texts, made, strict=True) if not np.array_equal(one, other)
    )


def _peak_bytes() -> int:
    """Of this process; what the system says of its children is right, what it says of itself is its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)


def _medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        "MB": runs[0]["MB"],
        "MB/s": statistics.median(run["MB"] / run["wall"] for run in runs),
        "MB per CPU second": statistics.median(run["MB"] / run["cpu"] for run in runs),
    }


def _print(figures: dict[str, Any]) -> None:
    table = Table("", "MB", "MB/s", "MB per CPU second")
    for name, row in figures["rows"].items():
        table.add_row(name, *(f"{value:,.1f}" for value in row.values()))
    console = Console(width=110)
    console.print(table)
    for name in figures["left out"]:
        console.print(f"left out, since not installed: {name}")
    console.print(", ".join(f"{name} {number}" for name, number in figures["versions"].items()))


def _child(name: str, tokenizer: Path, folder: Path, workers: int, files: Sequence[Path]) -> dict[str, float]:
    folder.mkdir(exist_ok=True)
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    arguments = map(str, (name, tokenizer, folder, workers, *files))
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.bench", "one", *arguments],
        env={**os.environ, **quiet, "HF_DATASETS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode:
        raise DataError(f"{name} failed: {done.stderr[-1500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    command()
