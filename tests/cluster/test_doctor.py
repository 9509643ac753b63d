"""`turnout doctor` on a testbed: no false alarm, and each planted fault named with its host."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from launch.testbed.machines import Machines
from tests.cluster.conftest import Place

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]
HOSTS = ["--hosts", "n1,n2,n3"]


@contextmanager
def _slow_link(machines: Machines) -> Iterator[None]:
    rate = ["root", "tbf", "rate", "80mbit", "burst", "64kb", "latency", "400ms"]
    machines.run("n3", ["tc", "qdisc", "add", "dev", "eth0", *rate])
    try:
        yield
    finally:
        machines.run("n3", ["tc", "qdisc", "del", "dev", "eth0", "root"])


@contextmanager
def _unplugged(machines: Machines) -> Iterator[None]:
    machines.unplug("n3")
    try:
        yield
    finally:
        machines.plug("n3")


@contextmanager
def _taken_port(machines: Machines) -> Iterator[None]:
    program = (
        "import socket, time; s = socket.create_server(('', 29511)); print(1, flush=True); time.sleep(900)"
    )
    process = subprocess.Popen(machines.on("n3", ["python3", "-c", program]), stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        machines.run("n3", ["pkill", "-f", "create_server"])
        process.communicate()


def test_a_doctor_passes_sound_hosts(place: Place) -> None:
    said = place.says("doctor", *HOSTS, "--port", "29511")
    assert said.endswith("nothing is wrong\n")
    assert said.count("MB/s") == 3


@pytest.mark.parametrize(
    ("plant", "finding"),
    [
        (_slow_link, "n3: its fastest link has"),
        (_unplugged, "n3: it does not answer"),
        (_taken_port, "n3: port 29511 is taken"),
    ],
)
def test_a_doctor_names_the_host_with_a_planted_fault(
    plant: Callable[[Machines], AbstractContextManager[None]], finding: str, place: Place
) -> None:
    with plant(place.cluster.machines):
        said = place.says("doctor", *HOSTS, "--port", "29511", code=1)
    assert finding in said
    assert said.endswith("leave out: n3\n")
