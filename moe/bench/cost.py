"""A recipe -> what each layout of it costs: seconds a step, memory a rank, and what an asynchronous save holds up.

`python -m moe.bench.cost RECIPE --ranks N` trains the recipe by `turnout train` for a few steps in every ZeRO stage and
expert parallelism, each in processes of its own and a folder of its own, which is removed.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

from moe import figures, log
from moe.config import RunConfig, check_world
from moe.errors import ConfigError, LaunchError, clean_exit
from moe.recipe import load

WARMUP_STEPS = 2
"""Steps that do not count: the first make room for moments and fill caches."""
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Layout:
    """What differs from run to run."""

    zero_stage: int
    expert_parallel_size: int
    offload: str = "none"

    def overrides(self) -> list[str]:
        return [f"parallel.{key}={value}" for key, value in asdict(self).items()]


@dataclass(frozen=True)
class Cost:
    """What a layout took."""

    layout: Layout
    step_seconds: float
    """Median, without evaluation and saves."""
    rank_bytes: int
    """Memory of its own of the rank that had most, at its peak; some 300 MiB are libraries."""
    held_share: float
    """For how much of a step a save held up training."""
    write_seconds: float
    """How long the save went on beside it."""


def layouts(run: RunConfig, ranks: int) -> list[Layout]:
    """Every stage and every expert parallelism that the recipe and the number of ranks allow, then offload."""
    tried = [Layout(zero, ep) for zero in (0, 1, 2, 3) for ep in range(1, ranks + 1)]
    tried += [Layout(1, ranks, "optimizer"), Layout(3, ranks, "all")]
    return [layout for layout in tried if _fits(run, layout, ranks)]


def measure(recipe: Path, overrides: Sequence[str], layout: Layout, ranks: int, steps: int) -> Cost:
    """Train once; raises `LaunchError` if it fails."""
    with tempfile.TemporaryDirectory(prefix="turnout-cost-") as folder:
        here = Path(folder)
        settings = [
            *overrides,
            *layout.overrides(),
            f"run_dir={here / 'run'}",
            f"train.steps={steps}",
            "train.schedule.warmup_steps=0",
            "train.evaluate_every=null",
            "logging.every_steps=1",
            f"checkpoint.every_steps={steps // 2}",
        ]
        command = [sys.executable, "-m", "moe.cli", "train", str(recipe), *settings, "--nproc", str(ranks)]
        with (here / "words").open("w+", encoding="utf-8") as words:
            process = subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT)
            peak = max(_resident(process), default=0)
            if process.wait():
                words.seek(0)
                last = "".join(words.readlines()[-3:]).strip()
                raise LaunchError(f"{layout} could not be trained: {last}. Mend that, or leave it out.")
        records = [json.loads(line) for line in (here / "run/metrics.jsonl").read_text().splitlines()]
    return _cost(layout, records, peak)


def _cost(layout: Layout, records: Sequence[dict[str, Any]], peak: int) -> Cost:
    seconds = median([record["seconds"] for record in records if "loss" in record][WARMUP_STEPS:])
    saves = [record for record in records if "checkpoint_held_seconds" in record]
    # The last save is waited for, since the run ends: the first shows what training feels.
    return Cost(
        layout,
        seconds,
        peak,
        saves[0]["checkpoint_held_seconds"] / seconds,
        saves[0]["checkpoint_write_seconds"],
    )


def _resident(process: "subprocess.Popen[bytes] | subprocess.Popen[str]") -> Iterator[int]:
    """Private memory of the largest rank, again and again until the process ends."""
    while process.poll() is None:
        with suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    info = child.memory_full_info() if sys.platform == "linux" else child.memory_info()
                    yield getattr(info, "uss", info.rss)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_SECONDS)


def _fits(run: RunConfig, layout: Layout, ranks: int) -> bool:
    page = run.model_dump()
    page["parallel"] |= asdict(layout)
    try:
        check_world(RunConfig.model_validate(page), ranks)
    except (ConfigError, ValueError):
        return False
    return True


def show(costs: Sequence[Cost], *, title: str, markdown: bool) -> None:
    """The table on stdout."""
    columns = ["ZeRO", "EP", "offload", "s/step", "MiB a rank, peak", "save holds up, steps", "save, s"]
    rows = [
        [
            str(cost.layout.zero_stage),
            str(cost.layout.expert_parallel_size),
            cost.layout.offload,
            f"{cost.step_seconds:.2f}",
            f"{cost.rank_bytes / 2**20:.0f}",
            f"{cost.held_share:.2f}",
            f"{cost.write_seconds:.1f}",
        ]
        for cost in costs
    ]
    console = Console(width=120, highlight=False, markup=False)
    if markdown:
        for cells in (columns, ["---:"] * len(columns), *rows):
            console.print(f"| {' | '.join(cells)} |", soft_wrap=True)
        return
    table = Table(*columns, title=title)
    for cells in rows:
        table.add_row(*cells)
    console.print(table)


@click.command("cost")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--steps", type=click.IntRange(min=2 * WARMUP_STEPS), default=8, show_default=True)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the figures to this file too."
)
@click.option("--markdown", is_flag=True, help="Print the table in Markdown.")
def command(
    recipe: Path, overrides: tuple[str, ...], ranks: int, steps: int, json_path: Path | None, markdown: bool
) -> None:
    """Train RECIPE for a few steps in every layout of so many ranks, and say what each costs."""
    log.setup()
    with clean_exit():
        if json_path is not None:
            figures.check_place(json_path)
        run = load(RunConfig, recipe, overrides)
        costs = []
        for layout in layouts(run, ranks):
            log.get().info("%s", " ".join(layout.overrides()))
            costs.append(measure(recipe, overrides, layout, ranks, steps))
        show(costs, title=f"{run.name} on {ranks} ranks", markdown=markdown)
        if json_path is not None:
            found = {"recipe": run.model_dump(mode="json"), "costs": [asdict(cost) for cost in costs]}
            figures.write(json_path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    command()
