"""However a launched run ends, nothing of it is left; and with fewer nodes, or more again, it goes on by itself."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest

from moe.errors import LaunchError
from tests.cluster import faults
from tests.cluster.conftest import LONG, Place, wait
from tests.cluster.cost import LIMITS, give_up, to_the_end

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

_SUSPENDED_SECONDS = 10.0
"""More than the lease and the limit of a step."""


def _cancel(place: Place, run: str) -> None:
    place.slurm("scancel", place.job(run))


def _kill_batch_script(place: Place, run: str) -> None:
    place.slurm("scancel", "--signal=KILL", "--batch", place.job(run))


@pytest.mark.parametrize("end", [_cancel, _kill_batch_script])
def test_no_process_of_a_job_is_left_ten_seconds_after_its_end(
    end: Callable[[Place, str], None], place: Place
) -> None:
    with _narrow(place, f"runs/ended{end.__name__}") as run:
        assert len(place.survivors(run)) > 4
        end(place, run)
        _leaves_nothing(place, run)


def _kill_srun(place: Place, run: str) -> None:
    sruns = {}
    for process in place.survivors(run):
        with suppress(psutil.Error):
            if process.name() == "srun":
                sruns[process.pid] = (process, process.ppid())
    (srun,) = (process for process, parent in sruns.values() if parent not in sruns)
    srun.kill()
    # A helper of it asks Slurm, once, to end the agents; on a busy machine that is lost, and training goes on.
    try:
        wait(lambda: len(place.attempts(run)) == 2, "the second attempt", 20)
    except AssertionError:
        place.slurm("scancel", "--signal=KILL", f"{place.job(run)}.0")


def test_a_node_that_is_not_to_blame_stays_in_the_job_and_one_that_is_drained_is_left(
    place: Place,
) -> None:
    """The job is suspended, then srun is killed, a rank is halted in its boot, and last a node is drained."""
    with _narrow(place, "runs/blameless") as run:
        place.slurm("scontrol", "suspend", place.job(run))
        before = place.step(run)
        time.sleep(_SUSPENDED_SECONDS)
        place.slurm("scontrol", "resume", place.job(run))
        wait(lambda: place.step(run) >= before + 3, "the suspended job to go on")
        assert len(place.attempts(run)) == 1
        _kill_srun(place, run)
        wait(lambda: len(place.attempts(run)) == 2, "the second attempt", 100)
        wait(lambda: sum(len(report.ranks) for report in place.files(run).reports(2)) == 2, "its ranks", 100)
        halted, struck = place.kill(run, 1, "STOP"), time.time()
        wait(lambda: len(place.attempts(run)) == 3, "the third attempt", 100)
        place.slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=a test")
        try:
            wait(lambda: place.attempts(run)[2].then == "requeued", "the job to leave the node", 100)
        finally:
            place.slurm("scontrol", "update", "NodeName=n2", "State=RESUME")
        _cancel(place, run)
        _leaves_nothing(place, run)
    first, second, third = place.attempts(run)[:3]
    assert (first.outcome, first.host) == ("failed", None)
    assert first.cause == "srun, which holds the agents, was ended by SIGKILL"
    assert (second.outcome, second.rank, second.host) == ("hung", 1, halted)
    assert "halted by a signal (SIGSTOP) in its boot" in (second.cause or "")
    assert second.ended is not None
    assert second.ended - struck < 8 + 10
    assert first.nodes == second.nodes == third.nodes
    assert (third.outcome, third.cause) == ("saved", "drain of n2")


@contextmanager
def _narrow(place: Place, run: str) -> Iterator[str]:
    """A run of a rank a node, which has taken some steps and has many to go."""
    narrow = ("--gpus-per-node", "1", "parallel.expert_parallel_size=2")
    place.launch(run, "slurm", *narrow, *LIMITS, "train.steps=100000")
    try:
        wait(lambda: place.step(run) >= 2, "step 2")
        yield run
    finally:
        give_up(place, run)
        faults.whole(place)


def _leaves_nothing(place: Place, run: str) -> None:
    wait(lambda: place.job_state(run) in ("CANCELLED", "FAILED"), "the job to end", 60)
    wait(lambda: place.survivors(run) == [], "every process of the run to end", 10)
    assert not place.files(run).done.exists()


def test_a_run_comes_back_on_fewer_nodes_and_then_on_more_with_the_same_batch(
    place: Place, long: dict[int, float]
) -> None:
    run = "runs/elastic"
    place.launch(run, "slurm", *LIMITS, "--min-nodes", "1", f"train.steps={LONG}")
    wait(lambda: place.step(run) >= 3, "step 3")
    place.slurm("scontrol", "update", "NodeName=n[2-3]", "State=DRAIN", "Reason=a test")
    try:
        with suppress(
            LaunchError
        ):  # the drain would be noticed too, some seconds later, and may have been by now
            faults.usr1(place, run)
        wait(lambda: place.attempts(run)[-1].nodes == ("n1",), "the run to come back on one node")
        wait(lambda: place.step(run) >= place.attempts(run)[-1].from_step + 3, "three steps there")
    except BaseException:
        give_up(place, run)
        raise
    finally:
        place.slurm("scontrol", "update", "NodeName=n[2-3]", "State=RESUME")
    assert "is back in the queue" in place.says("requeue", run)
    to_the_end(place, run)
    attempts = place.attempts(run)
    assert [len(attempt.nodes) for attempt in attempts] == [2, 1, 2]
    assert [attempt.outcome for attempt in attempts] == ["saved", "saved", "done"]
    assert [attempt.overrides for attempt in attempts] == [(), ("parallel.expert_parallel_size=2",), ()]
    assert [attempt.last_step for attempt in attempts[:2]] == [attempt.from_step for attempt in attempts[1:]]
    losses, near = place.losses(run), attempts[2].from_step + 5
    assert _until(near, losses) == pytest.approx(_until(near, long), rel=1e-5)
    # Other sums differ in their last digits: some steps later a near-tie of a router falls to another expert.
    assert losses == pytest.approx(long, rel=5e-3)
    faults.whole(place)


def _until(step: int, losses: dict[int, float]) -> dict[int, float]:
    return {number: loss for number, loss in losses.items() if number <= step}
