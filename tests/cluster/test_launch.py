"""Launched through Slurm, pdsh or ssh on several machines, a run equals the local one, and outlives what fails."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from launch.testbed.machines import Machines
from tests.cluster.conftest import HERE, LONG, Place, wait

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]


def test_on_hosts_a_run_has_the_bits_of_the_local_one(place: Place, expected: dict[int, float]) -> None:
    """Through ssh; through pdsh below."""
    place.launch("runs/ssh", "ssh")
    assert place.losses("runs/ssh") == expected
    _leaves_nothing(place, "runs/ssh")


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


@pytest.mark.nightly
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


def test_a_killed_rank_and_a_halted_one_are_named_and_the_run_goes_on_in_its_allocation(
    place: Place, long: dict[int, float]
) -> None:
    place.launch("runs/hurt", "slurm", "--hang-limit", "8", f"train.steps={LONG}")
    wait(lambda: place.taken("runs/hurt", 1) >= 18, "step 18")
    killed = place.kill("runs/hurt", 3, "KILL")
    wait(lambda: place.taken("runs/hurt", 2) >= 18, "as many steps of the second attempt")
    halted, struck = place.kill("runs/hurt", 2, "STOP"), time.time()
    _to_the_end(place, "runs/hurt", long)
    first, second, third = place.attempts("runs/hurt")
    assert (first.outcome, first.rank, first.host, first.cause) == ("failed", 3, killed, "ended by SIGKILL")
    assert f"rank 3 on {killed}: ended by SIGKILL" in place.says("explain", "runs/hurt")
    assert (second.outcome, second.rank, second.host) == ("hung", 2, halted)
    assert second.ended is not None
    assert second.ended - struck < 8 + 10
    assert "most recent call first" in (place.files("runs/hurt").logs(2) / "rank_0.stack").read_text()
    assert 0 == first.from_step < second.from_step < third.from_step  # as far as was saved by then
    assert (third.outcome, third.job) == ("done", first.job)


def test_stop_saves_and_ends_one_run_and_leaves_another_on_the_same_hosts(
    place: Place, expected: dict[int, float]
) -> None:
    one = place.start("runs/one", "ssh", "train.steps=100000")
    other = place.start("runs/other", "pdsh")
    wait(lambda: place.step("runs/one") >= 2, "the first to train")
    place.says("stop", "runs/one")
    assert one.wait(timeout=200) == 75
    _leaves_nothing(place, "runs/one")
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


@pytest.mark.nightly
def test_a_slow_rank_is_named_with_its_host_while_the_run_goes_on(place: Place) -> None:
    process = place.start("runs/slow", "ssh", "train.steps=100000")
    wait(lambda: place.step("runs/slow") >= 20 or process.poll() is not None, "step 20")
    assert "is slow" not in place.says("status", "runs/slow")
    with _slowed(place, "runs/slow", 3) as host:
        wait(lambda: f"{host} is slow: rank 3 " in place.says("status", "runs/slow"), "the verdict", 90)
    place.says("stop", "runs/slow")
    assert process.wait(timeout=200) == 75


@pytest.mark.nightly
def test_ranks_end_when_their_supervisor_is_killed(place: Place, expected: dict[int, float]) -> None:
    process = place.start("runs/orphan", "pdsh", "--lease", "4", "train.steps=100000")
    wait(lambda: place.step("runs/orphan") >= 2, "step 2")
    assert len(place.survivors("runs/orphan")) > 4
    for found in place.survivors("runs/orphan"):
        with suppress(psutil.Error):
            if "launch" in found.cmdline():  # the command itself, and nsenter before it
                found.kill()
    process.wait(timeout=100)
    _leaves_nothing(place, "runs/orphan")


def test_a_testbed_leaves_nothing(home: Path, tmp_path: Path) -> None:
    machines = Machines.up(tmp_path / "bed", 2)
    assert machines.run("n1", ["hostname"]).strip() == "n1"
    sleeper = subprocess.Popen(machines.on("n2", ["sleep", "1000"]))
    wait(lambda: sleeper.pid and len(machines.pids("n2")) > 2, "the sleeper")
    assert len(list(Path("/run/netns").glob(f"{machines.prefix}*"))) == 4
    machines.down()
    assert sleeper.wait(timeout=60) != 0
    assert list(Path("/run/netns").glob(f"{machines.prefix}*")) == []
    assert not machines.folder.exists()


def _to_the_end(place: Place, run: str, expected: dict[int, float]) -> None:
    """The job is over, every step was taken as if nothing had happened, and no process is left."""
    job = place.job(run)
    wait(lambda: (place.folder / run / "done").exists(), f"{run} to be done")
    wait(lambda: "COMPLETED" in place.slurm("scontrol", "show", "job", job), "the job to complete", 60)
    assert place.losses(run) == expected
    _leaves_nothing(place, run)


def _leaves_nothing(place: Place, run: str) -> None:
    wait(lambda: place.survivors(run) == [], "every process of the run to end", 10)
