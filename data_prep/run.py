"""`turnout prepare RECIPE [key=value ...]`: text -> token shards, a tokenizer and a manifest."""

from pathlib import Path

import click

from data_prep.prepare import prepare
from data_prep.recipe import DataRecipe
from moe import log
from moe.errors import clean_exit
from moe.recipe import load


@click.command("prepare")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--overwrite", is_flag=True, help="Replace what another recipe made in the output folder.")
def command(recipe: Path, overrides: tuple[str, ...], overwrite: bool) -> None:
    """Turn text into token shards as RECIPE says; KEY=VALUE changes a setting of it."""
    log.setup()
    with clean_exit():
        prepare(load(DataRecipe, recipe, overrides), overwrite=overwrite)


if __name__ == "__main__":
    command()
