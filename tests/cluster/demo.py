"""The demo's recipe and text, with experts across nodes -> the bits of a local run through Slurm, pdsh and ssh.

    python -m tests.cluster.demo --steps 12

A line a way; exit code 1 if one ends with other losses or other weights. As root, on a testbed of its own; minutes.
"""

import os
import sys
from pathlib import Path

import click

from launch.demo import CONFIGS
from tests.cluster.conftest import Place
from tests.cluster.cost import a_place, to_the_end

ACROSS = ("parallel.expert_parallel_size=4", "train.micro_batch_size=2")
"""Of two nodes with two ranks each."""


def _trained(place: Place, kind: str, steps: int) -> str:
    """The run, once it is done."""
    run = f"runs/{kind}"
    place.launch(run, kind, *ACROSS, f"train.steps={steps}", f"checkpoint.every_steps={steps}")
    if kind == "slurm":
        to_the_end(place, run)
    return run


@click.command()
@click.option("--steps", type=click.IntRange(min=1), default=12, show_default=True)
def command(steps: int) -> None:
    """Train the demo's recipe on 2 nodes x 2 ranks in every way, and compare each step with a local run."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    same = True
    data, recipe = (Path(CONFIGS / name).read_text() for name in ("data/stdlib.yaml", "demo.yaml"))
    with a_place(data, recipe) as place:
        local = _trained(place, "local", steps)
        for kind in ("slurm", "pdsh", "ssh"):
            run = _trained(place, kind, steps)
            losses, weights = place.losses(run), place.weights(run)
            equal = (losses == place.losses(local), weights == place.weights(local))
            same &= all(equal)
            last = losses[max(losses)]
            said = " and ".join(
                f"{what} {'equal' if good else 'NOT EQUAL'}"
                for what, good in zip(
                    (f"{len(losses)} losses", f"{len(weights)} tensors"), equal, strict=True
                )
            )
            click.echo(
                f"{kind}: loss {last:.4f} after step {steps}; {said} to those of a local run, to the bit"
            )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    command()
