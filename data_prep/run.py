"""`turnout prepare RECIPE [key=value ...]`: text -> token shards, a tokenizer and a manifest."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from data_prep import staged
from data_prep.prepare import prepare
from data_prep.recipe import DataRecipe
from moe import log
from moe.errors import ConfigError, clean_exit
from moe.recipe import load


@click.command("prepare")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--overwrite", is_flag=True, help="Replace what another recipe made in the output folder.")
@click.option(
    "--stage", type=click.Choice(staged.STAGES), help="Do this stage alone, on a complete one before it."
)
@click.option(
    "--executor",
    type=click.Choice(["local", "slurm", "ray"]),
    help="Work in stages: in processes of this machine, an array job of Slurm each, or tasks of Ray.",
)
@click.option("--dry-run", is_flag=True, help="Tell what would be done, part by part, and do nothing.")
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    overwrite: bool,
    stage: str | None,
    executor: str | None,
    dry_run: bool,
) -> None:
    """Turn text into token shards as RECIPE says; KEY=VALUE changes a setting of it."""
    log.setup()
    with clean_exit(), _told_to_end():
        page = _load(recipe, overrides, executor)
        if page.is_staged:
            staged.prepare(page, staged.Asked(overwrite, stage, dry_run, click.echo))
        elif stage or dry_run:
            raise click.UsageError(
                "this recipe is done in one piece: add --executor local to do it in stages"
            )
        else:
            prepare(page, overwrite=overwrite)


@contextmanager
def _told_to_end() -> Iterator[None]:
    """SIGTERM as Ctrl-C: what is half done is removed and what Slurm has in its queue is cancelled."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _load(recipe: Path, overrides: tuple[str, ...], executor: str | None) -> DataRecipe:
    if executor is None:
        return load(DataRecipe, recipe, overrides)
    try:
        return load(DataRecipe, recipe, (f"executor.type={executor}", *overrides))
    except ConfigError:  # perhaps of settings in the recipe that are another executor's
        return load(DataRecipe, recipe, (f"executor={{type: {executor}}}", *overrides))


if __name__ == "__main__":
    command()
