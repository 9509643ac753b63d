"""However a launched run ends, nothing of it is left; and with fewer nodes, or more again, it goes on by itself."""

from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from tests.cluster.conftest import LONG, Place, wait
from tests.cluster.cost import LIMITS, give_up, to_the_end
from tests.cluster.faults import whole

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]


def _cancel(place: Place, run: str) -> None:
    place.slurm("scancel", place.job(run))


def _kill_batch_script(place: Place, run: str) -> None:
    place.slurm("scancel", "--signal=KILL", "--batch", place.job(run))


def _kill_srun(place: Place, run: str) -> None:
    for process in place.survivors(run):
        with suppress(psutil.Error):  # it is two processes, of which one ends with the other
            if process.cmdline()[0] == "srun":
                process.kill()
    place.slurm("scancel", place.job(run))


@pytest.mark.parametrize("end", [_cancel, _kill_batch_script, _kill_srun])
def test_no_process_of_a_job_is_left_ten_seconds_after_its_end(
    end: Callable[[Place, str], None], place: Place
) -> None:
    run = f"runs/ended{end.__name__}"
    narrow = ("--gpus-per-node", "1", "parallel.expert_parallel_size=2")
    place.launch(run, "slurm", *narrow, *LIMITS, "train.steps=100000")
    try:
        wait(lambda: place.step(run) >= 2, "step 2")
        assert len(place.survivors(run)) > 4
        end(place, run)
        wait(lambda: place.job_state(run) in ("CANCELLED", "FAILED"), "the job to end", 60)
        wait(lambda: place.survivors(run) == [], "every process of the run to end", 10)
        assert not place.files(run).done.exists()
    finally:
        give_up(place, run)
        whole(place)


def test_a_run_comes_back_on_fewer_nodes_and_then_on_more_with_the_same_batch(
    place: Place, long: dict[int, float]
) -> None:
    run = "runs/elastic"
    place.launch(run, "slurm", *LIMITS, "--min-nodes", "1", f"train.steps={LONG}")
    wait(lambda: place.step(run) >= 3, "step 3")
    place.slurm("scontrol", "update", "NodeName=n[2-3]", "State=DRAIN", "Reason=a test")
    try:
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
    assert place.losses(run) == pytest.approx(long, rel=1e-5)
    whole(place)
