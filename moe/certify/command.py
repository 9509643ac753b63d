"""`turnout certify`: a recipe -> a table, certificate.json, and an exit code."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe import log, recipe
from moe.checkpoint.certificate import CERTIFICATE
from moe.config import RunConfig
from moe.errors import ConfigError, clean_exit

if TYPE_CHECKING:
    from moe.certify.prove import Progress

EXIT_FAILED = 1
_SECONDS_BETWEEN_SENTENCES = 10.0


@click.command("certify")
@click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "--world", type=click.IntRange(1, 64), default=4, show_default=True, help="Ranks to spread training over."
)
@click.option(
    "--layouts",
    multiple=True,
    metavar="AXIS=VALUE,...",
    help="Try these instead of a selection, such as ep=1/2,zero=1/2,accumulation=2,recompute=block,then=resize.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write the certificate; the run's folder if not given.",
)
def command(
    recipe_path: Path,
    overrides: tuple[str, ...],
    world: int,
    layouts: tuple[str, ...],
    json_path: Path | None,
) -> None:
    """Prove that RECIPE trains the same in any layout as in one process.

    A small copy of the recipe, with all its switches, takes a few steps in each layout: expert parallelism, ZeRO,
    accumulation, recomputation, resumed, resized. Losses, counts, gradients, norm, clip, biases and the optimizer's
    step are held against one process and against rules that hold for any training.

    Exit codes: 0 all is as in one process; 1 something is not; 2 what was asked for cannot be done.
    """
    log.setup()
    with clean_exit():
        run = recipe.load(RunConfig, recipe_path, overrides)
        target = json_path or run.folder / CERTIFICATE
        _refuse_unwritable(target)
        from rich.console import Console

        from moe.certify.page import certificate, show, write
        from moe.certify.prove import certify

        with _progress() as progress:
            proof = certify(run, world, layouts, progress)
        show(proof, Console(width=None if sys.stdout.isatty() else 160))
        write(certificate(proof), target)
        click.echo(f"certificate: {target}")
    sys.exit(0 if proof.passed else EXIT_FAILED)


def _refuse_unwritable(target: Path) -> None:
    """Before minutes of work, not after; makes nothing, since the recipe may be refused yet."""
    if target.is_dir():
        raise ConfigError(f"--json is {target}, but that is a folder. Give the path of a file.")
    place = next(parent for parent in target.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        why = "not writable" if place.is_dir() else "not a folder"
        raise ConfigError(
            f"{target} cannot be written: {place} is {why}. Give --json the path of a file that can be."
        )


@contextmanager
def _progress() -> Iterator["Progress"]:
    """A live line on a terminal, a sentence now and then elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Line

    from moe.certify.prove import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Sentences().progress()
        return
    columns = (
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Line(*columns, console=console, transient=True) as line:
        task = line.add_task("starting", total=None)
        yield Progress(
            begin=lambda total: line.update(task, total=total),
            done=lambda what: line.update(task, advance=1, description=what),
        )


class _Sentences:
    """For logs."""

    def __init__(self) -> None:
        self.total = self.number = 0
        self.spoke = time.monotonic()

    def begin(self, total: int) -> None:
        self.total = total
        log.get().info("%d small trainings to compare", total)

    def done(self, what: str) -> None:
        self.number += 1
        if time.monotonic() - self.spoke > _SECONDS_BETWEEN_SENTENCES:
            self.spoke = time.monotonic()
            log.get().info("%d of %d trainings done, the last on %s", self.number, self.total, what)

    def progress(self) -> "Progress":
        from moe.certify.prove import Progress

        return Progress(self.begin, self.done)


if __name__ == "__main__":
    command()
