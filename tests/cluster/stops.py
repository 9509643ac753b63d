"""A number and a seed -> so many planned stops of one run, at random moments, and whether each cost no step.

    python -m tests.cluster.stops --stops 20 --seed 1

A line a stop; exit code 1 if one lost a step or was no requeue, or if the run does not end by itself with the weights
of a run that nothing happened to. As root, on a testbed of its own; half a minute a stop.
"""

import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise

import click

from launch.folder import Attempt
from launch.slurm import field
from tests.cluster import faults
from tests.cluster.conftest import Place, wait
from tests.cluster.cost import LIMITS, a_place, give_up, lost, to_the_end, undisturbed

_EARLY = 0.25
"""Of the stops, while the ranks boot."""
_BOOT_SECONDS, _MOST_STEPS = 12.0, 6
_NOTICE_SECONDS = 15
"""What is left of the time limit; a run is told of it when 10 s are."""
STEPS_A_STOP = 30
"""Of the whole run; some are taken while the stop is on its way."""
OVERRIDES = ("train.global_batch_size=32", f"checkpoint.every_steps={10 * STEPS_A_STOP}")
"""Slow steps, and no checkpoint but those of stops."""


@dataclass(frozen=True)
class Stop:
    """A way to ask a run to save and to come back."""

    ask: Callable[[Place, str], object]
    mend: Callable[[Place, str], object] = lambda place, run: None
    """Once it is back."""


def _shorten(place: Place, run: str) -> None:
    """What is left of its time, to as much as lets it save; Slurm tells it when it sees fit."""
    place.slurm("scontrol", "update", f"JobId={place.job(run)}", f"EndTime=now+{_NOTICE_SECONDS}")


def _lengthen(place: Place, run: str) -> None:
    place.slurm("scontrol", "update", f"JobId={place.job(run)}", "TimeLimit=60")


def _drain(place: Place, run: str) -> None:
    """The last of its nodes, which may be another one each time."""
    node = place.attempts(run)[-1].nodes[-1]
    place.slurm("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=a test")


def _resume(place: Place, run: str) -> None:
    for node, state in place.cluster.states().items():
        if state.startswith("drain"):
            place.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")


STOPS = {
    "USR1": Stop(faults.usr1),
    "scontrol requeue": Stop(faults.requeue),
    "preemption": Stop(faults.preempt),
    "drain": Stop(_drain, _resume),
    "time limit": Stop(_shorten, _lengthen),
    "turnout requeue": Stop(lambda place, run: place.says("requeue", run)),
}


def drawn(number: int, dice: random.Random) -> list[str]:
    """Every way as often as any other, or once more, in random order."""
    ways = list(islice(cycle(STOPS), number))
    dice.shuffle(ways)
    return ways


def stopped(place: Place, run: str, ways: Sequence[str], dice: random.Random) -> str:
    """Train with these stops, through Slurm, to the end; the run that nothing happened to, of as many steps.

    Raises AssertionError if the run does not come back after a stop, or does not end by itself.
    """
    steps = STEPS_A_STOP * (len(ways) + 1)
    expected = undisturbed(place, steps, *OVERRIDES)
    limits = (*LIMITS, "--time", "60", "--signal-before", "10")
    place.launch(run, "slurm", *limits, *OVERRIDES, f"train.steps={steps}")
    try:
        for number, way in enumerate(ways, start=1):
            _wait_for_moment(place, run, number, dice)
            STOPS[way].ask(place, run)
            _wait_for_attempt(place, run, number + 1)
            STOPS[way].mend(place, run)
        to_the_end(place, run)
    finally:
        give_up(place, run)
        _resume(place, run)
    return expected


def _wait_for_moment(place: Place, run: str, number: int, dice: random.Random) -> None:
    """While attempt `number` boots, or some steps later."""
    early, seconds, steps = (
        dice.random() < _EARLY,
        dice.uniform(0, _BOOT_SECONDS),
        dice.randint(1, _MOST_STEPS),
    )
    _wait_for_attempt(place, run, number)
    begin = place.attempts(run)[-1]
    if early:
        time.sleep(max(0.0, begin.began + seconds - time.time()))
    else:
        wait(lambda: place.step(run) >= begin.from_step + steps, f"{steps} steps of attempt {number}")


def _wait_for_attempt(place: Place, run: str, number: int) -> None:
    wait(lambda: len(place.attempts(run)) >= number, f"attempt {number}", 200)


def faulty(attempt: Attempt, after: Attempt) -> str | None:
    """What is wrong with how an attempt was stopped and how the next went on, in words."""
    if attempt.outcome != "saved":
        return f"{attempt.outcome}: {attempt.cause}"
    if steps := lost([(attempt, after)]):
        return f"{steps} steps lost"
    return None if after.job == attempt.job else f"no requeue, but job {after.job} after {attempt.job}"


def requeues(place: Place, run: str) -> int:
    """Of its last job, as Slurm counts them."""
    page = place.slurm("scontrol", "--oneliner", "show", "job", place.job(run))
    return int(field(page, "Restarts") or 0)


@click.command()
@click.option("--stops", "number", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def command(number: int, seed: int) -> None:
    """Stop a run again and again in every way that lets it save, and see that it loses no step."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    dice, run = random.Random(seed), f"runs/stops-{seed}"
    ways = drawn(number, dice)
    with a_place() as place:
        try:
            expected = stopped(place, run, ways, dice)
        except AssertionError as error:
            click.echo(f"{place.says('explain', run)}\nNO END: {error}")
            sys.exit(1)
        attempts = place.attempts(run)
        faults_seen = [faulty(*pair) for pair in pairwise(attempts)]
        for way, attempt, wrong in zip(ways, attempts, faults_seen, strict=False):
            steps = f"steps {attempt.from_step} to {attempt.last_step or attempt.from_step}"
            click.echo(f"{way}: {steps}, {attempt.cause}: {wrong or 'no step lost'}")
        restarts = requeues(place, run)
        same = place.weights(run) == place.weights(expected)
    good = sum(wrong is None for wrong in faults_seen)
    click.echo(
        f"{number} stops; Slurm counts {restarts} requeues of one job; {good} of {len(faults_seen)} lost no step; "
        f"{'the right weights' if same else 'OTHER WEIGHTS'}"
    )
    sys.exit(0 if same and (good, restarts, len(attempts)) == (number, number, number + 1) else 1)


if __name__ == "__main__":
    command()
