"""Launched through Slurm, pdsh or ssh on several machines, a run equals the local one, and outlives what fails."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.testbed.machines import Machines
from tests.cluster.conftest import HERE, Place, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("kind", ["pdsh", "ssh"])
def test_on_hosts_a_run_has_the_bits_of_the_local_one(
    kind: str, place: Place, expected: dict[int, float]
) -> None:
    place.launch(f"runs/{kind}", kind)
    assert place.losses(f"runs/{kind}") == expected
    assert place.survivors(f"runs/{kind}") == []


def test_through_slurm_a_run_has_the_bits_of_the_local_one(place: Place, expected: dict[int, float]) -> None:
    place.launch("runs/slurm", "slurm")
    _to_the_end(place, "runs/slurm", expected)
    assert [attempt.outcome for attempt in place.attempts("runs/slurm")] == ["done"]


STAND_IN = """\
#!/bin/sh
# Stands in for apptainer: no image, but the command line that it would get.
[ "$1 $2" = "exec --nv" ] || exit 9
while [ "${{1##*/}}" != image.sif ]; do
  [ "$1" = --pwd ] && cd "$2"
  shift
done
shift
touch "$(hostname).inside"
export PYTHONPATH={here}
exec "$@"
"""


@pytest.mark.cluster
def test_in_a_container_a_run_has_the_bits_of_the_local_one(
    place: Place, expected: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = place.folder / "bin"
    tools.mkdir()
    (tools / "apptainer").write_text(STAND_IN.format(here=HERE))
    (tools / "apptainer").chmod(0o755)
    (place.folder / "image.sif").touch()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    inside = ["--container", "image.sif", "--container-python", sys.executable]
    place.launch("runs/inside", "slurm", *inside)
    _to_the_end(place, "runs/inside", expected)
    assert {path.name for path in place.folder.glob("*.inside")} == {"n1.inside", "n2.inside"}


@pytest.mark.cluster
def test_a_killed_rank_is_named_and_the_run_goes_on_in_its_allocation(
    place: Place, expected: dict[int, float]
) -> None:
    place.launch("runs/killed", "slurm")
    wait(lambda: place.step("runs/killed") >= 13, "step 13")
    host = place.kill("runs/killed", 3, "KILL")
    _to_the_end(place, "runs/killed", expected)
    first, second = place.attempts("runs/killed")
    assert (first.outcome, first.rank, first.host) == ("failed", 3, host)
    assert first.cause == "ended by SIGKILL"
    assert (second.outcome, second.from_step, second.job) == ("done", 10, first.job)
    said = place.says("explain", "runs/killed")
    assert f"rank 3 on {host}: ended by SIGKILL" in said


def _usr1(place: Place, job: str) -> None:
    place.slurm("scancel", "--signal=USR1", "--batch", job)  # what Slurm does before the time limit


def _requeue(place: Place, job: str) -> None:
    place.slurm("scontrol", "requeue", job)


def _preempt(place: Place, job: str) -> None:
    place.slurm(
        "sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"
    )


@pytest.mark.parametrize("ask", [_usr1, _requeue, _preempt])
@pytest.mark.cluster
def test_asked_to_make_way_it_saves_and_is_requeued_without_a_step_lost(
    ask: Callable[[Place, str], None], place: Place, expected: dict[int, float]
) -> None:
    run = f"runs/way{ask.__name__}"
    place.launch(run, "slurm")
    wait(lambda: place.step(run) >= 3, "step 3")
    ask(place, place.job(run))
    _to_the_end(place, run, expected)
    first, second = place.attempts(run)
    assert first.outcome == "saved"
    assert first.to_step == first.last_step == second.from_step


@pytest.mark.cluster
def test_a_halted_rank_is_found_within_the_limit_and_named_with_its_stack(
    place: Place, expected: dict[int, float]
) -> None:
    place.launch("runs/hung", "slurm", "--hang-limit", "8")
    wait(lambda: place.step("runs/hung") >= 12, "step 12")
    host = place.kill("runs/hung", 2, "STOP")
    halted = time.time()
    _to_the_end(place, "runs/hung", expected)
    first = place.attempts("runs/hung")[0]
    assert (first.outcome, first.rank, first.host) == ("hung", 2, host)
    assert first.ended is not None
    assert first.ended - halted < 8 + 10
    stacks = place.files("runs/hung").logs(1)
    assert "most recent call first" in (stacks / "rank_0.stack").read_text()


@pytest.mark.cluster
def test_stop_saves_and_ends_one_run_and_leaves_another_on_the_same_hosts(
    place: Place, expected: dict[int, float]
) -> None:
    one = place.start("runs/one", "pdsh", "train.steps=100000")
    other = place.start("runs/other", "pdsh")
    wait(lambda: place.step("runs/one") >= 2, "the first to train")
    place.says("stop", "runs/one")
    assert one.wait(timeout=60) == 75
    assert place.survivors("runs/one") == []
    assert other.wait(timeout=400) == 0
    (attempt,) = place.attempts("runs/one")
    assert (attempt.outcome, attempt.cause) == ("saved", "turnout stop")
    assert attempt.last_step == attempt.to_step
    assert place.losses("runs/other") == expected
    assert [attempt.outcome for attempt in place.attempts("runs/other")] == ["done"]


@contextmanager
def _slowed(place: Place, run: str, rank: int) -> Iterator[str]:
    """A rank that the machine lets run for a third of the time alone; its host."""
    host, pid = place.pid(run, rank)
    program = "while kill -STOP $0; do sleep 0.2; kill -CONT $0; sleep 0.1; done"
    brake = subprocess.Popen(
        place.cluster.machines.on(host, ["bash", "-c", program, str(pid)]), start_new_session=True
    )
    try:
        yield host
    finally:
        os.killpg(brake.pid, signal.SIGKILL)
        brake.wait()
        place.cluster.machines.run(host, ["kill", "-CONT", str(pid)])


@pytest.mark.cluster
def test_a_slow_rank_is_named_with_its_host_while_the_run_goes_on(place: Place) -> None:
    process = place.start("runs/slow", "ssh", "train.steps=100000")
    wait(lambda: place.step("runs/slow") >= 20 or process.poll() is not None, "step 20")
    assert "is slow" not in place.says("status", "runs/slow")
    with _slowed(place, "runs/slow", 3) as host:
        wait(lambda: f"{host} is slow: rank 3 " in place.says("status", "runs/slow"), "the verdict", 90)
    place.says("stop", "runs/slow")
    assert process.wait(timeout=60) == 75


@pytest.mark.cluster
def test_ranks_end_when_their_supervisor_is_killed(place: Place, expected: dict[int, float]) -> None:
    process = place.start("runs/orphan", "pdsh", "--lease", "4", "train.steps=100000")
    wait(lambda: place.step("runs/orphan") >= 2, "step 2")
    assert len(place.survivors("runs/orphan")) > 4
    for found in place.survivors("runs/orphan"):
        if "launch" in found.cmdline():  # the command itself, and nsenter before it
            found.kill()
    process.wait(timeout=30)
    wait(lambda: place.survivors("runs/orphan") == [], "every process of the run to end", seconds=10)


@pytest.mark.cluster
def test_a_crashed_node_is_replaced_by_a_spare(place: Place, expected: dict[int, float]) -> None:
    place.launch("runs/spare", "slurm", "--spares", "1", "--lease", "5")
    wait(lambda: place.step("runs/spare") >= 12, "step 12")
    place.cluster.machines.unplug("n2")
    place.cluster.machines.crash("n2")
    try:
        wait(lambda: place.attempts("runs/spare")[-1].outcome == "done", "the run to be done")
        assert place.losses("runs/spare") == expected
        first, second = place.attempts("runs/spare")
        assert (first.outcome, first.nodes) == ("lost", ("n1", "n2"))
        assert (second.outcome, second.nodes, second.job) == ("done", ("n1", "n3"), first.job)
    finally:
        place.cluster.machines.plug("n2")
        place.cluster.machines.boot("n2")
        place.cluster.start_node("n2")
        wait(lambda: set(place.cluster.states().values()) == {"idle"}, "the node to come back")


def test_a_testbed_leaves_nothing(home: Path, tmp_path: Path) -> None:
    machines = Machines.up(tmp_path / "bed", 2)
    assert machines.run("n1", ["hostname"]).strip() == "n1"
    sleeper = subprocess.Popen(machines.on("n2", ["sleep", "1000"]))
    wait(lambda: sleeper.pid and len(machines.pids("n2")) > 2, "the sleeper")
    assert len(list(Path("/run/netns").glob(f"{machines.prefix}*"))) == 4
    machines.down()
    assert sleeper.wait(timeout=10) != 0
    assert list(Path("/run/netns").glob(f"{machines.prefix}*")) == []
    assert not machines.folder.exists()


def _to_the_end(place: Place, run: str, expected: dict[int, float]) -> None:
    """The job is over, every step was taken as if nothing had happened, and no process is left."""
    job = place.job(run)
    wait(lambda: (place.folder / run / "done").exists(), f"{run} to be done")
    wait(lambda: "COMPLETED" in place.slurm("scontrol", "show", "job", job), "the job to complete", 60)
    assert place.losses(run) == expected
    wait(lambda: place.survivors(run) == [], "every process to end", 10)
