"""A number and a seed -> so many random faults over several runs, at random moments, and whether all ended well.

    python -m tests.cluster.chaos --faults 20 --seed 1

A line a run; exit code 1 if a run did not end by itself, left a process, or has other weights than a run that nothing
happened to. As root, on a testbed of its own; half a minute a fault. The seed fixes what strikes and when it is meant
to; what it then meets, in a rank that just saves or boots, the machine decides.
"""

import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import click

from launch.testbed.machines import CONTROLLER
from moe.errors import LaunchError
from tests.cluster import faults
from tests.cluster.conftest import Place, wait
from tests.cluster.cost import LIMITS, a_place, give_up, is_given_up, lost, to_the_end, undisturbed

_STEPS = 80
_A_RUN = 4
"""Faults, at most."""
_OFF = "power-off of n2"
_BOOT_SECONDS = 20.0
_EARLY = 0.3
"""Of the faults, while the ranks boot."""

Strike = Callable[[Place, str], object]


def _on_a_rank(signal: str, rank: int) -> Strike:
    return lambda place, run: place.kill(run, rank, signal)


_KINDS: dict[str, Strike] = {
    **{f"kill -9 of rank {rank}": _on_a_rank("KILL", rank) for rank in range(4)},
    **{f"SIGSTOP of rank {rank}": _on_a_rank("STOP", rank) for rank in range(4)},
    "kill -9 of n1's agent": faults.kill_agent("n1"),
    "kill -9 of n2's agent": faults.kill_agent("n2"),
    "USR1": faults.usr1,
    "scontrol requeue": faults.requeue,
    "preemption": faults.preempt,
    "turnout requeue": lambda place, run: place.says("requeue", run),
    "link down for 2 s": faults.unplug(2.0),
    "slurmctld restarted": faults.kill_daemon(CONTROLLER, "slurmctld", 1.0),
    "slurmd killed for 2 s": faults.kill_daemon("n2", "slurmd", 2.0),
    _OFF: faults.power_off("n2"),
}


def disturbed(place: Place, run: str, most: int, dice: random.Random, struck: list[str]) -> None:
    """Train with up to so many faults, and to the end; what strikes is added to `struck`.

    Raises AssertionError if the run does not end by itself, leaves a process, or loses a step by a planned stop.
    """
    # With the fewest nodes it comes back without its spare, when one is off.
    place.launch(run, "slurm", *LIMITS, "--spares", "1", "--min-nodes", "2", f"train.steps={_STEPS}")
    moments: list[_Moment] = []
    try:
        while len(struck) < most:
            name = dice.choice([name for name in _KINDS if name != _OFF or _OFF not in struck])
            early, later, steps = dice.random() < _EARLY, dice.uniform(0, _BOOT_SECONDS), dice.randint(1, 15)
            moment = _moment(place, run, moments, name, later if early else None, steps)
            if moment is None:
                break  # it is done
            with suppress(Exception):  # what it was meant for may be gone
                _KINDS[name](place, run)
                struck.append(name)
                moments.append(moment)
        to_the_end(place, run)
        saved = [pair for pair in itertools.pairwise(place.attempts(run)) if pair[0].outcome == "saved"]
        assert lost(saved) == 0, "steps lost by a planned stop"
    finally:
        give_up(place, run)
        if _OFF in struck:
            faults.boot("n2")(place)
        faults.whole(place)


@dataclass(frozen=True)
class _Moment:
    """When a fault struck."""

    fault: str
    attempt: int
    checkpoint: int
    """The newest one's step."""


def _moment(
    place: Place, run: str, before: Sequence[_Moment], fault: str, early: float | None, steps: int
) -> _Moment | None:
    """Wait for the moment to strike, so many seconds into the boot or so many steps after it; None: the run ends first.

    Each fault may cost an attempt, and with a third that makes no checkpoint a run is given up, as it should: after two
    faults the next waits for a checkpoint.
    """

    def settled(earlier: _Moment, later: _Moment) -> bool:
        if earlier.fault != _OFF:
            return earlier.attempt != later.attempt
        try:
            return place.cluster.states()["n2"].startswith("down")
        except LaunchError:  # slurmctld does not answer yet
            return False

    def found() -> _Moment | None:
        attempt = next(iter(place.attempts(run)[-1:]), None)
        if attempt is None or attempt.outcome is not None:
            return None
        ranks = [rank for report in place.files(run).reports(attempt.number) for rank in report.ranks]
        if len(ranks) < 4 or any(rank.code is not None for rank in ranks):
            return None
        moment = _Moment(fault, attempt.number, place.files(run).newest_step())
        if sum(other.checkpoint == moment.checkpoint for other in before) >= 2:
            return None
        if any(_forgets({other.fault, fault}) and not settled(other, moment) for other in before):
            return None
        if early is not None:
            booted = min(rank.still_seconds for rank in ranks) >= early or any(rank.beats for rank in ranks)
            return moment if booted else None
        reached = min(rank.step or 0 for rank in ranks) >= min(attempt.from_step + steps, _STEPS - 3)
        return moment if reached else None

    def over() -> bool:
        return (place.folder / run / "done").exists() or is_given_up(place, run)

    at: list[_Moment] = []
    wait(lambda: over() or at or at.extend(filter(None, [found()])), "a moment to strike")
    return at[0] if at else None


def _forgets(faults: set[str]) -> bool:
    """Whether Slurm 22.05 loses the GPUs of a job by these two, one soon after the other, and nothing can help a run.

    A job that Slurm itself requeues before it has noticed that a node of it is dead: no step of it begins again, and
    its GPUs are free for no other job, until an administrator says `scontrol reconfigure`.
    """
    return _OFF in faults and bool(faults & {"scontrol requeue", "preemption"})


@dataclass(frozen=True)
class Storm:
    """Faults that struck one run, and what became of it."""

    struck: tuple[str, ...]
    outcomes: tuple[str, ...]
    """Of its attempts."""
    wrong: str | None = None
    """None: it ended by itself, with the right weights."""

    def __str__(self) -> str:
        outcomes = ", ".join(self.outcomes)
        return f"{'; '.join(self.struck)}: {outcomes}: {self.wrong or 'the right weights'}"


def storms(place: Place, number: int, seed: int) -> Iterator[Storm]:
    """So many faults, over as many runs as that takes."""
    dice, count = random.Random(seed), 0
    expected = place.weights(undisturbed(place, _STEPS))
    for run in (f"runs/chaos-{seed}-{index}-" for index in itertools.count(1)):
        if count >= number:
            return
        struck: list[str] = []
        try:
            disturbed(place, run, min(_A_RUN, number - count), dice, struck)
            wrong = None if place.weights(run) == expected else "OTHER WEIGHTS"
        except AssertionError as error:
            wrong = f"NO END: {error}\n{place.says('explain', run)}"
        count += max(1, len(struck))
        yield Storm(tuple(struck), tuple(str(attempt.outcome) for attempt in place.attempts(run)), wrong)


@click.command()
@click.option("--faults", "number", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def command(number: int, seed: int) -> None:
    """Plant random faults in runs, and see that all end by themselves with the right weights."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    seen = []
    with a_place() as place:
        for storm in storms(place, number, seed):
            seen.append(storm)
            click.echo(f"seed {seed}, run {len(seen)}: {storm}")
    bad = sum(storm.wrong is not None for storm in seen)
    click.echo(
        f"{sum(len(storm.struck) for storm in seen)} faults in {len(seen)} runs, {bad} of which went wrong"
    )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    command()
