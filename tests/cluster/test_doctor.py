"""`turnout doctor` on a testbed: no false alarm, and each planted fault named with its host."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import numpy
import pytest

from moe.errors import LaunchError
from tests.cluster.conftest import Place, faketime, wait

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]
WAYS = {"hosts": ["--hosts", "n1,n2,n3"], "slurm": ["--on", "slurm"]}
SECONDS = 15.0


@contextmanager
def _slow_link(place: Place) -> Iterator[None]:
    """By netem, or where the kernel has none, by a token bucket."""
    run = place.cluster.machines.run
    add = ["tc", "qdisc", "add", "dev", "eth0", "root"]
    try:
        run("n3", [*add, "netem", "rate", "80mbit", "delay", "2ms"])
    except LaunchError:
        run("n3", [*add, "tbf", "rate", "80mbit", "burst", "64kb", "latency", "400ms"])
    try:
        yield
    finally:
        run("n3", ["tc", "qdisc", "del", "dev", "eth0", "root"])


@contextmanager
def _unplugged(place: Place) -> Iterator[None]:
    place.cluster.machines.unplug("n3")
    try:
        yield
    finally:
        place.cluster.machines.plug("n3")


@contextmanager
def _taken_port(place: Place) -> Iterator[None]:
    program = (
        "import socket, time; s = socket.create_server(('', 29511)); print(1, flush=True); time.sleep(900)"
    )
    machines = place.cluster.machines
    process = subprocess.Popen(machines.on("n3", ["python3", "-c", program]), stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        machines.run("n3", ["pkill", "-f", "create_server"])
        process.communicate()


@contextmanager
def _mounted(place: Place, *options: str, on: str) -> Iterator[None]:
    """Something else there, for the processes of n3 alone."""
    place.cluster.machines.run("n3", ["mount", *options, on])
    try:
        yield
    finally:
        place.cluster.machines.run("n3", ["umount", "--lazy", on])


@contextmanager
def _read_only(place: Place) -> Iterator[None]:
    folder = str(place.folder)
    with _mounted(place, "--bind", folder, on=folder):
        place.cluster.machines.run("n3", ["mount", "-o", "remount,ro,bind", folder])
        yield


@contextmanager
def _another_folder(place: Place) -> Iterator[None]:
    with _mounted(place, "-t", "tmpfs", "-o", "size=2g", "tmpfs", on=str(place.folder)):
        yield


@contextmanager
def _full_scratch(place: Place) -> Iterator[None]:
    with _mounted(place, "-t", "tmpfs", "-o", "size=1m", "tmpfs", on="/dev/shm"):
        yield


@contextmanager
def _another_version(place: Place) -> Iterator[None]:
    (path,) = Path(numpy.__file__).parents[1].glob("numpy-*.dist-info/METADATA")
    other = place.folder / "METADATA"
    other.write_text(path.read_text().replace(f"\nVersion: {numpy.__version__}\n", "\nVersion: 1.0.7\n", 1))
    with _mounted(place, "--bind", str(other), on=str(path)):
        yield


@contextmanager
def _other_etc(place: Place) -> Iterator[Path]:
    """A copy of /etc that n3 alone sees; where time is to be faked, since namespaces have no clock of their own."""
    etc = place.folder / "etc"
    place.cluster.machines.run("n3", ["cp", "-a", "/etc", str(etc)])
    try:
        with _mounted(place, "--bind", str(etc), on="/etc"):
            yield etc
    finally:
        shutil.rmtree(etc)


@contextmanager
def _fast_clock(place: Place) -> Iterator[None]:
    """Every program that begins on n3 reads a clock 7 s ahead. (Not for sshd: its sandbox ends it then.)"""
    with _other_etc(place) as etc:
        (etc / "ld.so.preload").write_text(f"{faketime()}\n")
        (etc / "faketimerc").write_text("+7s\n")
        yield


@contextmanager
def _fast_clock_by_ssh(place: Place) -> Iterator[None]:
    """Whoever logs in on n3 reads a clock 7 s ahead."""
    with _other_etc(place) as etc:
        shell = etc / "shell"
        shell.write_text(f'#!/bin/sh\nexec env LD_PRELOAD={faketime()} FAKETIME=+7s /bin/sh "$@"\n')
        shell.chmod(0o755)
        users = (etc / "passwd").read_text()
        (etc / "passwd").write_text(re.sub(r"^(root:.*):[^:]*$", r"\1:/etc/shell", users, flags=re.MULTILINE))
        yield


def _ask(place: Place, *options: str, code: int) -> str:
    return place.says("doctor", *options, "--port", "29511", code=code)


@pytest.mark.parametrize("way", WAYS)
def test_a_doctor_passes_sound_hosts_every_time_and_in_time(way: str, place: Place) -> None:
    """Twenty runs in a row were tried as well: `TURNOUT_DOCTOR_RUNS=10 make test-cluster`."""
    for _ in range(int(os.environ.get("TURNOUT_DOCTOR_RUNS", "1"))):
        began = time.monotonic()
        said = _ask(place, *WAYS[way], code=0)
        took = time.monotonic() - began
        assert said.endswith("nothing is wrong\n")
        assert said.count("links") == 3
        assert took < SECONDS
        if way == "slurm":
            assert place.slurm("squeue", "--noheader", "--states=R,PD") == ""


Plant = Callable[[Place], AbstractContextManager[None]]
FAULTS: dict[str, dict[Plant, str]] = {
    "slow": {_slow_link: "n3: its fastest link has"},
    "small things": {
        _taken_port: "n3: port 29511 is taken",
        _full_scratch: "n3: /dev/shm has 1 MB free, 17 MB are wanted",
        _another_version: "n3: numpy: 1.0.7 here, but {numpy} elsewhere",
        _fast_clock_by_ssh: "n3: its clock is off by +7.",
    },
    "read-only": {_read_only: "n3: {folder}: Read-only file system"},
    "not shared": {_another_folder: "n3: it does not see {folder} as the first machine does"},
    "unplugged": {_unplugged: "n3: it does not answer"},
}


def _all_idle(place: Place) -> None:
    wait(lambda: set(place.cluster.states().values()) == {"idle"}, "all nodes to be idle", 100)


def _finds(place: Place, way: str, faults: dict[Plant, str]) -> None:
    with ExitStack() as planted:
        for plant in faults:
            planted.enter_context(plant(place))
        said = _ask(place, *WAYS[way], code=1)
    for finding in faults.values():
        known = {"folder": place.folder, "numpy": importlib.metadata.version("numpy")}
        assert finding.format(**known) in said
    assert said.count("\nn3: ") == len(faults), said
    assert said.endswith("leave out: n3\n")


@pytest.mark.parametrize("what", FAULTS)
def test_a_doctor_names_the_host_with_planted_faults(what: str, place: Place) -> None:
    _finds(place, "hosts", FAULTS[what])


def test_through_slurm_a_doctor_finds_the_same(place: Place) -> None:
    _all_idle(place)  # one that was unplugged a moment ago Slurm may not have heard of since
    _finds(place, "slurm", FAULTS["slow"] | {_fast_clock: "n3: its clock is off by +7."})


def test_a_doctor_says_what_slurm_has_against_a_node(place: Place) -> None:
    place.slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=broken fan")
    try:
        said = _ask(place, *WAYS["slurm"], code=1)
    finally:
        place.slurm("scontrol", "update", "NodeName=n2", "State=RESUME")
        _all_idle(place)
    assert "n2: Slurm has it drained: broken fan" in said
    assert said.endswith("leave out: n2\n")


def test_a_full_file_system_is_no_fault_of_one_host(place: Place, small: Path) -> None:
    full = small / "full"
    full.touch()
    os.posix_fallocate(descriptor := os.open(full, os.O_WRONLY), 0, shutil.disk_usage(small).free)
    os.close(descriptor)
    try:
        said = _ask(place, *WAYS["hosts"], "--folder", str(small), code=1)
    finally:
        full.unlink()
    assert f"all hosts: {small}: No space left on device" in said
    assert said.endswith("leave out none: mend what is wrong\n")
