"""Data through a real Slurm: the bytes of a local run, and every failed task ends the command and is named."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from launch.testbed.machines import CONTROLLER
from tests.cluster.conftest import Place, wait
from tests.unit.corpus import contents
from tests.unit.failing import BAD

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

SECONDS = 40
DOUBT_SECONDS = 5
"""For a record to be seen, or a task to begin yet; users' clusters are given more."""
STAGED = {
    "name": "staged",
    "sources": [{"type": "text", "paths": [f"{Path(json.__file__).parent}/*.py"]}],
    "tokenizer": {"type": "bpe", "vocab_size": 300},
    "clean": {"mask_pii": True},
    "duplicates": {"near": {}},
    "validation": {"fraction": 0.2},
}


def _prepare(place: Place, name: str, *arguments: str, code: int = 0) -> str:
    page = place.folder / f"{name}.yaml"
    page.write_text(yaml.safe_dump(STAGED))
    return place.says("prepare", page.name, f"output=data/{name}", "part_megabytes=1", *arguments, code=code)


def _line(place: Place, how: str, folder: str, config: str) -> list[str]:
    given = [how, str(place.folder / folder), config, str(DOUBT_SECONDS)]
    return place.cluster.machines.on(CONTROLLER, [sys.executable, "-m", "tests.unit.failing", *given])


def _failing(place: Place, how: str, folder: str, config: str) -> "subprocess.Popen[str]":
    (place.folder / folder).mkdir()
    return subprocess.Popen(
        _line(place, how, folder, config),
        env=place.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _hanging(place: Place, folder: str, config: str) -> tuple["subprocess.Popen[str]", str]:
    """The command, whose job runs, and the job's number."""
    process = _failing(place, "hangs", folder, config)
    page = place.folder / folder / "slurm/job"
    wait(page.exists, "the job to be submitted")
    wait(lambda: "R" in place.slurm("squeue", "--noheader", "--format=%t"), "it to run")
    return process, page.read_text()


def test_through_slurm_the_bytes_are_those_of_a_local_run(place: Place) -> None:
    _prepare(place, "here", "--executor", "local")
    said = _prepare(
        place, "with space", "--executor", "slurm", "executor.task_minutes=10", "executor.partition=main"
    )
    assert "text: job" in said
    assert contents(place.folder / "data/with space") == contents(place.folder / "data/here")
    assert place.slurm("squeue", "--noheader") == ""
    assert "up to date" in _prepare(place, "with space", "--executor", "slurm")


@pytest.mark.parametrize(
    ("how", "words"),
    {
        "killed": "failed: FAILED",
        "refused": "cannot be read",
        "raises": "a fault of ours",
        "disk full": "No space left",
        "says it is done": "SystemExit",
        "exits 0": "left no record",
        "hangs": "took longer than executor.part_minutes",
    }.items(),
)
def test_a_failed_task_ends_the_command_and_is_named(place: Place, how: str, words: str) -> None:
    folder, limit = f"bad-{how.replace(' ', '-')}", 0.05 if how == "hangs" else 525_600
    began = time.monotonic()
    process = _failing(place, how, folder, f"{{type: slurm, part_minutes: {limit}}}")
    said = process.communicate(timeout=200)[0]
    assert time.monotonic() - began < SECONDS + 3  # the part itself takes as long
    assert process.returncode == 2, said
    assert words in said
    assert f"0000{BAD}" in said
    assert "of Slurm" in said or how == "hangs"
    assert place.slurm("squeue", "--noheader") == ""
    assert not list((place.folder / folder / "stage").glob(f"*0000{BAD}*"))


def test_a_cancelled_task_ends_the_command(place: Place) -> None:
    process, job = _hanging(place, "bad-cancelled", "{type: slurm}")
    place.slurm("scancel", f"{job}_{BAD}")
    began = time.monotonic()
    said = process.communicate(timeout=200)[0]
    assert time.monotonic() - began < SECONDS
    assert (process.returncode, "failed: CANCELLED" in said) == (2, True), said
    assert f"0000{BAD}" in said


def test_what_slurm_refuses_is_said(place: Place) -> None:
    process = _failing(place, "well", "refused", "{type: slurm, partition: nowhere}")
    said = process.communicate(timeout=200)[0]
    assert (process.returncode, "invalid partition" in said) == (2, True), said


@pytest.mark.parametrize(
    ("settings", "reason"),
    [("partition: urgent, task_minutes: 60", "PartitionTimeLimit"), ("cpus: 4000", "PartitionConfig")],
)
def test_a_task_that_cannot_begin_ends_the_command(place: Place, settings: str, reason: str) -> None:
    place.slurm("scontrol", "update", "PartitionName=urgent", "MaxTime=1")
    try:
        began = time.monotonic()
        process = _failing(place, "well", f"bad-{reason}", f"{{type: slurm, {settings}}}")
        said = process.communicate(timeout=200)[0]
        assert time.monotonic() - began < SECONDS
        assert (process.returncode, f"will not begin: PENDING ({reason})" in said) == (2, True), said
        assert "00000" in said
    finally:
        place.slurm("scontrol", "update", "PartitionName=urgent", "MaxTime=INFINITE")


def test_slurms_time_limit_ends_the_command(place: Place) -> None:
    process, job = _hanging(place, "bad-slow", "{type: slurm, task_minutes: 60, workers: 2}")
    task = f"{job}_{BAD % 2}"  # with two tasks in the array, every second part is its
    # A limit has at least a minute, but the end that follows from it can be earlier.
    place.slurm("scontrol", "update", f"JobId={task}", "EndTime=now+1")
    said = process.communicate(timeout=300)[0]
    assert (process.returncode, f"task {task} of Slurm failed: TIMEOUT" in said) == (2, True), said
    assert f"0000{BAD}" in said


def test_what_a_killed_command_left_in_the_queue_is_cancelled_by_the_next(place: Place) -> None:
    process = _failing(place, "hangs", "orphan", "{type: slurm}")
    page = place.folder / "orphan/slurm/job"
    wait(page.exists, "the job to be submitted")
    first = page.read_text()
    for found in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
        with suppress(psutil.NoSuchProcess):  # it asks Slurm by short commands
            found.kill()
    process.wait()
    again = _line(place, "well", "orphan", "{type: slurm}")
    done = subprocess.run(again, env=place.env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert place.slurm("squeue", "--noheader") == ""
    assert f"job {first.strip()} " not in done.stderr, done.stderr
    assert {path.name for path in (page.parents[1] / "stage").iterdir()} == {
        name for n in range(5) for name in (f"{n:05d}", f"{n:05d}.json")
    }
