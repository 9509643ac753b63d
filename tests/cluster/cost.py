"""A launched run and a fault -> what the fault cost: seconds to the first new step, steps lost; the same weights."""

import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil
import yaml

from launch.folder import Attempt
from launch.testbed import command as testbed
from launch.testbed.machines import Machines
from launch.testbed.slurm import Cluster
from tests.cluster.conftest import DATA, RECIPE, Place, wait

STEPS, EVERY = 40, 10
"""Of a run, and between its checkpoints."""
LIMITS = ("--lease", "5", "--hang-limit", "8", "--agent-limit", "15", "--boot-limit", "60")
_POLL_SECONDS = 0.02
_LEFT_SECONDS = 10.0


@dataclass(frozen=True)
class Fault:
    """What is done to a run, and what is expected of it."""

    name: str
    strike: Callable[[Place, str], float | None]
    """Returns when it struck (s since 1970), if that is later than when it was called."""
    mend: Callable[[Place], None] = lambda place: None
    """Make the cluster whole again, after the run's end."""
    spares: int = 0
    outcome: str = "failed"
    """Of the first attempt; done: the run goes on in it."""
    goal: float | None = None
    """Seconds to the first new step beyond those of a boot."""
    at: int = EVERY + 2
    """The step at which it strikes."""
    options: tuple[str, ...] = ()
    steps: int = STEPS

    @property
    def most_lost(self) -> int:
        """Steps that may be taken again: none if the stop was planned."""
        return 0 if self.outcome in ("done", "saved") else EVERY


@dataclass(frozen=True)
class Cost:
    """What a fault cost a run."""

    boot: float
    """Seconds from the first attempt's begin to its first step."""
    seconds: float
    """From the fault to the first new step."""
    stopped: float
    """From the fault to the first attempt's end."""
    lost: int
    """Steps that were taken again."""
    attempts: tuple[Attempt, ...]


@dataclass
class Timeline:
    """When which step of a run was recorded, seen from outside."""

    path: Path
    seen: list[tuple[float, int]] = field(default_factory=list)
    """Time (s since 1970) and step."""

    @contextmanager
    def watching(self) -> Iterator["Timeline"]:
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,))
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()

    def _watch(self, over: threading.Event) -> None:
        before = None
        while not over.wait(_POLL_SECONDS):
            with suppress(OSError):
                status = self.path.stat()
                if (mark := (status.st_ino, status.st_size, status.st_mtime_ns)) != before:
                    before = mark
                    steps = [step for step in map(_step, self.path.read_text().splitlines()) if step]
                    self.seen.append((time.time(), max(steps, default=0)))

    def first(self, after: float, step: int) -> float:
        """When `step` or a later one was first recorded after a time."""
        return next(when for when, reached in self.seen if when > after and reached >= step)

    def gap_end(self, after: float) -> float:
        """The end of the longest time without a record after a time."""
        times = [after, *(when for when, _ in self.seen if when > after)]
        return max(pairwise(times), key=lambda pair: pair[1] - pair[0])[1]


def _step(line: str) -> int | None:
    with suppress(ValueError):
        record = json.loads(line)
        return int(record["step"]) if "loss" in record else None
    return None


def suffer(place: Place, run: str, fault: Fault) -> Cost:
    """Train with the fault, through Slurm, to the end; the cluster is whole afterwards.

    Raises AssertionError if the run does not end by itself, or leaves a process behind.
    """
    timeline = Timeline(place.folder / run / "metrics.jsonl")
    with ExitStack() as stack:
        stack.callback(fault.mend, place)
        stack.callback(give_up, place, run)
        stack.enter_context(timeline.watching())
        options = ("--spares", str(fault.spares), *LIMITS, *fault.options)
        place.launch(run, "slurm", *options, f"train.steps={fault.steps}")
        wait(lambda: place.step(run) >= fault.at, f"step {fault.at}")
        called = time.time()
        struck = fault.strike(place, run) or called
        to_the_end(place, run)
    attempts = place.attempts(run)
    if len(attempts) > 1:
        again = timeline.first(attempts[1].began, attempts[1].from_step + 1)
    else:
        again = timeline.gap_end(struck)
    boot = timeline.first(attempts[0].began, 1) - attempts[0].began
    stopped = (attempts[0].ended or struck) - struck
    return Cost(boot, again - struck, stopped, lost(pairwise(attempts)), tuple(attempts))


def to_the_end(place: Place, run: str) -> None:
    """Wait for the run's own end. Raises AssertionError if there is none, or a process is left ten seconds later."""
    wait(lambda: (place.folder / run / "done").exists() or is_given_up(place, run), f"{run} to end", 500)
    assert not is_given_up(place, run), f"{run} was given up"
    try:
        wait(lambda: place.job_state(run) == "COMPLETED", "the job to complete", 60)
    except AssertionError as error:
        asked = (
            ("scontrol", "-o", "show", "job", place.job(run)),
            ("squeue", "--long"),
            ("sinfo", "-N", "--long"),
        )
        said = [place.slurm(*words) for words in asked]
        for process in place.survivors(run):
            with suppress(psutil.Error):
                said.append(f"{process.pid} {' '.join(process.cmdline())}")
        raise AssertionError("\n".join([str(error), *said])) from None
    wait(lambda: place.survivors(run) == [], "every process of the run to end", _LEFT_SECONDS)


def is_given_up(place: Place, run: str) -> bool:
    """Whether nobody goes on with it."""
    return any((attempt.then or "").startswith("given up") for attempt in place.attempts(run))


def give_up(place: Place, run: str) -> None:
    """Nothing of a run that went wrong shall disturb the next."""
    if not (place.folder / run / "done").exists():
        with suppress(Exception):
            place.slurm("scancel", place.job(run))


def lost(pairs: Iterable[tuple[Attempt, Attempt]]) -> int:
    """Steps that were taken and then taken again, by where the next attempt began."""
    return sum(max(0, (one.last_step or 0) - after.from_step) for one, after in pairs)


def undisturbed(place: Place, steps: int, *overrides: str) -> str:
    """A run of so many steps on this machine alone, with such overrides of the recipe; trained once."""
    run = f"runs/undisturbed{'-'.join([str(steps), *overrides])}"
    if not (place.folder / run / "done").exists():
        place.launch(run, "local", f"train.steps={steps}", *overrides)
    return run


@contextmanager
def a_place(data: str = yaml.safe_dump(DATA), recipe: str = yaml.safe_dump(RECIPE)) -> Iterator[Place]:
    """A testbed of three nodes for as long as it is used, and a folder with such data and recipe."""
    testbed.check(slurm=True)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # nothing of it is left, also by a kill or in the background
        signal.signal(number, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="turnout-") as home:
        machines = Machines.up(Path(home) / "testbed", 3)
        try:
            place = Place(Path(home) / "work", Cluster.up(machines, cpus=4, gpus=2))
            place.folder.mkdir()
            (place.folder / "data.yaml").write_text(data)
            (place.folder / "recipe.yaml").write_text(recipe)
            place.says("prepare", "data.yaml")
            yield place
        finally:
            machines.down()
