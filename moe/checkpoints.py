"""The checkpoints of a run, looked at and looked after: `turnout checkpoint list|verify|prune|resize RUN`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe import log
from moe.config import RunConfig
from moe.errors import CheckpointError, ConfigError, clean_exit
from moe.recipe import load

if TYPE_CHECKING:
    from moe.checkpoint.listing import Entry

KEYS = ("world", "ep", "zero", "micro")


@click.group("checkpoint")
def command() -> None:
    """List, verify, prune or resize the checkpoints of a run's folder. Needs no GPU and no launcher."""
    log.setup()


_run = click.argument("run", type=click.Path(path_type=Path))
_step = click.option("--step", type=click.IntRange(min=0), help="One saved step.")


@command.command("list")
@_run
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def list_(run: Path, as_json: bool) -> None:
    """Say what stands in RUN/checkpoints: step, tokens, date, size, layout, and whether it is complete."""
    with _clean(run):
        from moe.checkpoint.listing import entries

        found = entries(run)
        click.echo(
            json.dumps([asdict(entry) for entry in found], indent=2) if as_json else "\n".join(_table(found))
        )


@command.command()
@_run
@_step
def verify(run: Path, step: int | None) -> None:
    """Hash every file and every tensor of all checkpoints of RUN, or of one; exit code 2 at the first bad one."""
    with _clean(run):
        from moe.checkpoint import folder as folders
        from moe.checkpoint import tensors
        from moe.checkpoint.read import chosen

        for number in [chosen(run, step)] if step is not None else _steps(run):
            folder = folders.step_folder(run, number)
            manifest = folders.read_manifest(folder)
            folders.verify(folder, manifest)
            count = tensors.verify(folder, manifest)
            hashed = f"{count} tensors" if count else "no hashes of tensors (format version 1)"
            click.echo(
                f"{folder.name}: {len(manifest.files)} files, {hashed}, {manifest.num_bytes / 1e6:,.1f} MB: as written"
            )


@command.command()
@_run
@click.option("--keep", type=click.IntRange(min=1), required=True, help="How many of the newest stay.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def prune(run: Path, keep: int, dry_run: bool) -> None:
    """Remove the older checkpoints of RUN and what killed saves left; never the newest, never a milestone.

    Milestones are those of checkpoint.keep_every in RUN/recipe.yaml. The newest is verified before anything goes.
    """
    with _clean(run):
        from moe.checkpoint import folder as folders
        from moe.checkpoint import retention
        from moe.checkpoint.lock import held

        def going() -> tuple[list[int], list[Path]]:
            steps, recipe = _steps(run), run / "recipe.yaml"
            every = load(RunConfig, recipe).checkpoint.keep_every if recipe.is_file() else None
            newest = folders.step_folder(run, steps[-1])
            folders.verify(newest, folders.read_manifest(newest))
            return retention.surplus(steps, keep, every), retention.leftovers(run / "checkpoints")

        steps, torn = going()
        if not dry_run:
            with held(run):
                steps, torn = going()  # a run may have saved before the folder was ours
                retention.remove(run, steps)
                retention.sweep(run / "checkpoints")
        names = [*(f"step_{step}" for step in steps), *(path.name for path in torn)]
        click.echo(f"{'would remove' if dry_run else 'removed'}: {', '.join(names) or 'nothing'}")


@command.command()
@_run
@click.option("--to", "layout", required=True, help="Such as world=2,ep=2,zero=1; what is not named stays.")
@_step
@click.option("--output", type=click.Path(path_type=Path), help="A new run folder; else in its place.")
def resize(run: Path, layout: str, step: int | None, output: Path | None) -> None:
    """Rewrite the newest checkpoint of RUN, or one, and its recipe for another layout, with equal hashes.

    Training resumes in any layout without this; it is for moving a run. Keys: world (ranks), ep
    (parallel.expert_parallel_size), zero (parallel.zero_stage), micro (train.micro_batch_size; if not named, the
    largest that fits).
    """
    with _clean(run):
        from moe.checkpoint.resize import resize as resized

        result = resized(run, _layout(layout), step, output)
        click.echo(
            f"resized {result.folder} from {result.before} to {result.after}: "
            f"{result.num_tensors} tensors equal by hash"
        )


@contextmanager
def _clean(run: Path) -> Iterator[None]:
    with clean_exit():
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or run}: {error.strerror or error}. Give access to it, or make room."
            ) from None


def _steps(run: Path) -> list[int]:
    from moe.checkpoint import folder as folders
    from moe.checkpoint.read import chosen

    chosen(run, None)
    return folders.steps(run)


def _layout(text: str) -> dict[str, int]:
    """`world=2,ep=2` -> numbers by name."""
    found: dict[str, int] = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key not in KEYS or key in found or not value.isdecimal() or len(value) > 9:
            raise ConfigError(
                f"--to is {text!r}, but {part.strip()!r} is no part of a layout: write each of "
                f"{', '.join(KEYS)} at most once, with a whole number, such as world=2,ep=2."
            )
        found[key] = int(value)
    if found.get("world") == 0:
        raise ConfigError(f"--to is {text!r}: there must be a rank. Use world=1 or more.")
    return found


def _table(found: "list[Entry]") -> Iterator[str]:
    rows = [("checkpoint", "tokens", "saved (UTC)", "size", "layout", "state")]
    for entry in found:
        tokens = "" if entry.tokens is None else f"{entry.tokens:,}"
        layout = "" if entry.layout is None else str(entry.layout)
        date = entry.date[:19].replace("T", " ")
        rows.append((entry.name, tokens, date, f"{entry.num_bytes / 1e6:,.1f} MB", layout, entry.state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield from (f"{entry.name} is damaged: {entry.fault}" for entry in found if entry.fault)


if __name__ == "__main__":
    command()
