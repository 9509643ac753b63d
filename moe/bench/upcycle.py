"""A dense recipe -> held-out losses of a sparse model trained on from the upcycled dense one, and from random weights.

`python -m moe.bench.upcycle RECIPE` trains the dense model, upcycles it, and trains the sparse one twice on the same
batches, which differ in `init_from` alone. A verb that is done is not done again: the same command goes on.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from moe import figures, log
from moe.config import RunConfig
from moe.errors import LaunchError, clean_exit
from moe.hf.targets import Options, target
from moe.recipe import load

BALANCE = ("balance.sequence_loss_weight=0", "balance.global_batch_loss_weight=0.01")
"""Of both sparse runs, as in the demo."""


@dataclass(frozen=True)
class Loss:
    """What one of the models came to."""

    model: str
    steps: int
    tokens: int
    """That it was trained on, those of the dense model before it apart."""
    loss: float
    """Held-out nats per token."""
    bits_per_byte: float


@dataclass(frozen=True)
class Plan:
    """The recipe, and where everything goes."""

    recipe: Path
    overrides: tuple[str, ...]
    folder: Path
    options: Options
    steps: int
    """Of the sparse runs."""
    ranks: int

    def dense(self) -> RunConfig:
        return load(RunConfig, self.recipe, [*self.overrides, f"run_dir={self.folder / 'dense'}"])

    def sparse(self, name: str, begin: Path | None) -> list[str]:
        """Overrides of the dense recipe for a sparse run in the folder `name`, with the weights in `begin` at first."""
        _, model = target(self.dense().model, self.options)
        return [
            *self.overrides,
            f"name={name}",
            f"run_dir={self.folder / name}",
            f"model={json.dumps(model.model_dump(mode='json'))}",
            f"train.steps={self.steps}",
            *BALANCE,
            *([] if begin is None else [f"init_from={begin}"]),
        ]


def compare(plan: Plan) -> list[Loss]:
    """Train and evaluate all three; raises `ConfigError` for impossible options, `LaunchError` if a verb fails."""
    dense = plan.dense()
    plan.sparse("scratch", None)  # impossible options show before anything is trained
    exported, upcycled = plan.folder / "dense-export", plan.folder / "upcycled-export"
    found = [_trained(plan, "dense", [*plan.overrides, f"run_dir={dense.folder}"])]
    if not exported.exists():
        _turnout("export", str(dense.folder), "--to", str(exported))
    if not upcycled.exists():
        given = {key: value for key, value in asdict(plan.options).items() if value is not None}
        choices = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
        _turnout("upcycle", str(exported), "--to", str(upcycled), "--verify", *choices)
    found.append(_trained(plan, "upcycled", plan.sparse("upcycled", upcycled)))
    found.append(_trained(plan, "scratch", plan.sparse("scratch", None)))
    return found


def table(found: list[Loss]) -> Table:
    """A row a model."""
    page = Table("model", "steps", "tokens", "held-out nats/token", "bits/byte")
    for loss in found:
        page.add_row(
            loss.model, str(loss.steps), f"{loss.tokens:,}", f"{loss.loss:.4f}", f"{loss.bits_per_byte:.4f}"
        )
    return page


def _trained(plan: Plan, name: str, overrides: list[str]) -> Loss:
    run = plan.folder / name
    if not (run / "done").is_file():
        _turnout("train", str(plan.recipe), *overrides, "--nproc", str(plan.ranks))
    if not (run / "evaluation.json").is_file():
        _turnout("evaluate", str(run), "--json", str(run / "evaluation.json"))
    page = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    recipe = load(RunConfig, run / "recipe.yaml")
    tokens = page["step"] * recipe.train.global_batch_size * recipe.data.sequence_length
    return Loss(name, page["step"], tokens, page["loss"], page["bits_per_byte"])


def _turnout(*arguments: str) -> None:
    code = subprocess.run([sys.executable, "-m", "moe.cli", *arguments], check=False).returncode
    if code:
        raise LaunchError(
            f"`turnout {arguments[0]}` ended with code {code}; it says why above. Mend it: the same command goes on."
        )


@click.command("upcycle")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/upcycle"), show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="Data recipe to prepare first.")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Of sparse runs.")
@click.option("--num-experts", type=int, default=8, show_default=True)
@click.option("--top-k", type=int, default=2, show_default=True)
@click.option("--granularity", type=int, default=1, show_default=True)
@click.option("--noise", type=float, default=0.0, show_default=True)
@click.option("--drop", type=float, default=0.0, show_default=True)
@click.option("--nproc", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the losses to this file too."
)
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    folder: Path,
    data: Path | None,
    steps: int,
    nproc: int,
    json_path: Path | None,
    **choices: float,
) -> None:
    """Train the dense model of RECIPE, and a sparse one from it and from scratch; print held-out losses."""
    log.setup()
    with clean_exit():
        if json_path is not None:
            figures.check_place(json_path)
        options = Options(**choices)  # type: ignore[arg-type]  # click has made the counts whole
        plan = Plan(recipe, overrides, folder, options, steps, nproc)
        plan.sparse("scratch", None)
        if data is not None:
            _turnout("prepare", str(data))
        found = compare(plan)
        Console(width=None if sys.stdout.isatty() else 100).print(table(found))
        _, upcycled, scratch = found
        click.echo(
            f"after {steps} steps on the same tokens: upcycled {upcycled.loss:.4f}, from scratch {scratch.loss:.4f} "
            f"nats/token, a difference of {scratch.loss - upcycled.loss:+.4f}"
        )
        if json_path is not None:
            figures.write(json_path, json.dumps([asdict(loss) for loss in found], indent=2) + "\n")


if __name__ == "__main__":
    command()
