"""A run's records -> one picture: `turnout report RUN`."""

from pathlib import Path

import click

from moe import log
from moe.config import RunConfig
from moe.errors import CheckpointError, ConfigError, clean_exit
from moe.recipe import load


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--png", type=click.Path(path_type=Path), help="File to write; RUN/report.png if not given.")
def command(run: Path, png: Path | None) -> None:
    """Draw the loss, the load of the experts and the health of the sparse layers of the run folder RUN."""
    log.setup()
    with clean_exit():
        from moe.report.plot import plot_run

        if png is not None and png.suffix.lower() != ".png":
            raise ConfigError(
                f"--png is {png}, but a PNG picture is written: its name must end with .png, "
                f"for example {png.with_suffix('.png') if png.name else 'report.png'}."
            )
        if not run.is_dir():
            raise CheckpointError(f"{run} is no folder: give the folder of a run, for example runs/NAME.")
        target = png or run / "report.png"
        recipe = run / "recipe.yaml"
        name = load(RunConfig, recipe).name if recipe.is_file() else None
        plot_run(run / "metrics.jsonl", target, name)
        click.echo(f"drawn: {target}")
