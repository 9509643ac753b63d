"""Figures of several runs of the layer's bench -> a table for all of one subject: a column for each of them.

`python -m moe.bench.columns runs/bench/*.json`
"""

import json
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import click

from moe.bench.peers import LIMIT, OURS
from moe.errors import ConfigError, clean_exit

Page = dict[str, Any]


@click.command("columns")
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
def command(files: tuple[Path, ...]) -> None:
    """Print what --json of `python -m moe.bench.layer` wrote to FILES, side by side, in Markdown."""
    with clean_exit():
        click.echo("\n\n".join(tables([read(path) for path in files])))


def read(path: Path) -> Page:
    """Raises `ConfigError`: no such figures there."""
    try:
        page: Page = json.loads(path.read_text(encoding="utf-8"))
        _table(_subject(page), [page])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds no figures of the layer's bench ({error!r}). Name files that its --json wrote."
        ) from None
    return page


def tables(pages: Sequence[Page]) -> list[str]:
    """One for each subject; columns by threads and allocator. Raises `ConfigError`: two runs for one column."""
    ordered = sorted(pages, key=lambda page: (_subject(page), _column(page)))
    for one, next_one in pairwise(ordered):
        if (_subject(one), _column(one)) == (_subject(next_one), _column(next_one)):
            raise ConfigError(
                f"two files have {_subject(one)} with {_threads(_column(one)[0])} and the {_column(one)[1]} allocator: "
                f"one column cannot hold both. Leave one out."
            )
    return [_table(name, list(group)) for name, group in groupby(ordered, key=_subject)]


def _subject(page: Page) -> str:
    """What has to be the same for ratios to stand side by side."""
    case, machine = page["case"], page["machine"]
    sizes = ", ".join(f"{name} {size}" for name, size in case["shape"].items())
    batches = "" if case["batches"] == "same" else f"{case['batches']} batches, "
    where = machine["gpu"] if case["device"] == "cuda" else machine["cpu"]
    return f"{case['dtype']}, {case['routing']} routing, {batches}{sizes}, {case['rounds']} rounds, {where}"


def _column(page: Page) -> tuple[int, str]:
    return page["machine"]["threads"], page["machine"]["allocator"]


def _table(subject: str, pages: Sequence[Page]) -> str:
    runs = [{line["name"]: line for line in page["lines"]} for page in pages]
    names = sorted({name for run in runs for name in run}, key=lambda name: _place(name, runs))
    rows = [[_title(name, runs), *(_ratio(name, run) for run in runs), _memory(name, runs)] for name in names]
    machines = [page["machine"] for page in pages]
    heads = [
        "",
        *(f"{_threads(machine['threads'])}, {machine['allocator']}" for machine in machines),
        "MiB",
    ]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join([f"{subject}:", "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def _place(name: str, runs: Sequence[dict[str, Any]]) -> tuple[bool, bool, float]:
    """The limit and ours first, then who is faster in the first run that has it."""
    ratio = next(run[name]["ratio"] for run in runs if name in run)
    return name != LIMIT.name, not name.startswith(OURS.name), ratio if name != OURS.name else 0.0


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def _title(name: str, runs: Sequence[dict[str, Any]]) -> str:
    version = next(run[name]["version"] for run in runs if name in run)
    said = f"{name} {version}"
    return f"**{said}**" if name == OURS.name else said


def _ratio(name: str, run: dict[str, Any]) -> str:
    if name not in run:
        return "-"
    if name == LIMIT.name:
        return "1"
    low, high = run[name]["ratio_quartiles"]
    ratio = f"{run[name]['ratio']:.2f}"
    return f"{f'**{ratio}**' if name == OURS.name else ratio} ({low:.2f}-{high:.2f})"


def _memory(name: str, runs: Iterable[dict[str, Any]]) -> str:
    """The most of all runs."""
    return f"{max(run[name]['peak_extra_bytes'] for run in runs if name in run) / 2**20:.0f}"


if __name__ == "__main__":
    command()
