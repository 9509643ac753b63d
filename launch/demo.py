"""`turnout demo`: every verb once, small, on real text; a table at the end, or a clear failure."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from moe import recipe
from moe.config import RunConfig
from moe.errors import EXIT_STOPPED, ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PROMPTS = ("def main(", "Return the")


@click.command()
def command() -> None:
    """Prepare text, train, stop, resume, evaluate, export, compare, generate, draw: once, small.

    Works in runs/demo and data/stdlib of this folder; a second demo starts over.
    """
    data_recipe, run_recipe = _recipe("data/stdlib.yaml"), _recipe("demo.yaml")
    run = recipe.load(RunConfig, run_recipe)
    folder = run.folder.parent  # the demo's; the run is one thing in it
    _start_over(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()

    _heading("Text: this Python's own library, as token shards")
    _turnout("prepare", str(data_recipe))

    train = ("train", str(run_recipe), "--nproc", "2")
    half = run.train.steps // 2
    _heading(f"Train on 2 ranks; SIGTERM after step {half} of {run.train.steps}")
    _turnout(*train, expect=EXIT_STOPPED, stop_when=lambda: _last_step(run.folder) >= half)
    stopped_at = _last_step(run.folder)
    _heading("The same command again: resume and finish")
    _turnout(*train)

    _heading("Held-out text: before and after training")
    before, after = folder / "before.json", folder / "after.json"
    _turnout("evaluate", str(run.folder), "--step", "0", "--json", str(before))
    _turnout("evaluate", str(run.folder), "--json", str(after))

    _heading("Export, and the same logits from stock transformers")
    export, comparison = folder / "export", folder / "export.json"
    _turnout("export", str(run.folder), "--to", str(export), "--verify", "--json", str(comparison))

    _heading("Generate from the export")
    for prompt in PROMPTS:
        _turnout("generate", str(export), "--prompt", prompt, "--max-new-tokens", "48")

    _heading("Picture")
    picture = folder / "report.png"
    _turnout("report", str(run.folder), "--png", str(picture))

    results = {
        "stopped_at": stopped_at,
        "before": _read(before),
        "after": _read(after),
        "comparison": _read(comparison)["comparison"],
    }
    _heading("What came of it")
    _table(run, results, export, picture, time.monotonic() - started)
    _judge(results)


def _recipe(name: str) -> Path:
    path = CONFIGS / name
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing: the demo needs the recipes of a clone. Run `make demo` in one."
        )
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _start_over(folder: Path) -> None:
    """An empty folder with our mark; only a folder with that mark is ever removed."""
    mark = folder / "made-by-turnout-demo"
    if folder.exists():
        if not mark.is_file():
            raise ConfigError(
                f"{folder} exists, but no demo made it (no {mark.name} in it), so it will not be removed. "
                f"Move it away, or run the demo in another folder."
            )
        click.echo(f"removing {folder}, which an earlier demo made")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    mark.write_text("`turnout demo` made this folder and removes it when it runs again.\n", encoding="utf-8")


def _turnout(*arguments: str, expect: int = 0, stop_when: Callable[[], bool] | None = None) -> None:
    """Run a verb in a process of its own; fail unless it ends with `expect`."""
    said = shlex.join(["turnout", *arguments])
    click.echo(f"$ {said}\n")
    process = subprocess.Popen([sys.executable, "-m", "moe.cli", *arguments])
    try:
        while stop_when is not None and process.poll() is None:
            if stop_when():
                process.terminate()
                stop_when = None
            time.sleep(0.2)
        code = process.wait()
    except KeyboardInterrupt:  # Ctrl-C reached the child too
        process.wait()
        raise
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code != expect:
        raise click.ClickException(f"`{said}` ended with code {code} instead of {expect}; it says why above.")


def _last_step(folder: Path) -> int:
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return max((int(json.loads(line)["step"]) for line in lines[-3:]), default=0)
    except FileNotFoundError:
        return 0


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _heading(text: str) -> None:
    from rich.console import Console
    from rich.rule import Rule

    console = Console()
    console.print()
    console.print(Rule(text, align="left"))
    console.file.flush()


def _table(run: RunConfig, results: Mapping[str, Any], export: Path, picture: Path, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from moe.records import read

    records = read(run.folder / "metrics.jsonl")
    speeds = sorted(records.column("tokens_per_second")[1])
    violations = records.column("max_violation")[1][-50:]
    before, after, comparison = results["before"], results["after"], results["comparison"]
    tokens = run.train.steps * run.train.global_batch_size * run.data.sequence_length
    checkpoint = run.folder / "checkpoints" / f"step_{after['step']}"
    rows = {
        "tokens trained on": f"{tokens:,}",
        "stopped and resumed at step": f"{results['stopped_at']} of {run.train.steps}",
        "tokens/s (median)": f"{speeds[len(speeds) // 2]:,.0f}",
        "held-out bits per byte, untrained": f"{before['bits_per_byte']:.3f}",
        "held-out bits per byte, unigram model": f"{after['unigram_bits_per_byte']:.3f}",
        "held-out bits per byte, trained": f"{after['bits_per_byte']:.3f}",
        f"load violation (largest / mean - 1), worst of {len(violations)} last steps": f"{max(violations):.2f}",
        "largest logits difference to stock transformers": f"{comparison['max_difference']:.1e}",
        "run": str(run.folder),
        "checkpoint": str(checkpoint),
        "export": str(export),
        "picture": str(picture),
        "time": f"{seconds / 60:.1f} minutes",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _judge(results: Mapping[str, Any]) -> None:
    after = results["after"]
    if after["bits_per_byte"] >= after["unigram_bits_per_byte"]:
        raise click.ClickException(
            f"the trained model needs {after['bits_per_byte']:.3f} bits per byte of held-out text, no fewer than "
            f"a unigram model's {after['unigram_bits_per_byte']:.3f}: it has not learned."
        )


if __name__ == "__main__":
    command()
