"""A testbed of three nodes with Slurm, and a tiny run that can be launched on it. Skipped where no testbed can be."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launch.folder import Attempt, LaunchFolder
from launch.testbed import command as testbed
from launch.testbed.machines import CONTROLLER, Machines
from launch.testbed.slurm import Cluster
from moe.errors import LaunchError

HERE = Path(__file__).resolve().parents[2]
DATA = {
    "name": "tiny",
    "sources": [{"type": "text", "paths": [str(Path(json.__file__).parent / "*.py")]}],
    "tokenizer": {"type": "bpe", "vocab_size": 300},
    "validation": {"fraction": 0.2},
}
# Its learning rate depends on the step, but not on the last one: a longer run begins with a shorter one.
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 2,
        "max_sequence_length": 64,
        "attention": {"num_heads": 4, "num_kv_heads": 2},
        "moe": {"num_experts": 8, "top_k": 2, "expert_intermediate_size": 16},
    },
    "data": {"path": "data/tiny", "sequence_length": 32},
    "train": {
        "steps": 30,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "precision": "fp32",
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"kind": "constant", "warmup_steps": 20},
    },
    "parallel": {"expert_parallel_size": 4},
    "checkpoint": {"every_steps": 10},
}
LONG = 80
"""Steps of a run that is stopped twice on its way."""
LAYOUT = {
    "local": ["--on", "local", "--ranks-per-node", "4"],
    "slurm": ["--on", "slurm", "--nodes", "2", "--gpus-per-node", "2", "--time", "20"],
    "pdsh": ["--on", "hosts", "--hosts", "n1,n2", "--ranks-per-node", "2"],
    "ssh": ["--on", "hosts", "--hosts", "n1,n2", "--ranks-per-node", "2", "--ssh"],
}


@dataclass(frozen=True)
class Place:
    """A folder that all machines see, with data and a recipe; every launch makes its own run folder in it."""

    folder: Path
    cluster: Cluster

    def turnout(self, *arguments: str, on: str = CONTROLLER) -> "subprocess.Popen[str]":
        command = self._on(on, arguments)
        return subprocess.Popen(
            command, env=self.env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _on(self, machine: str, arguments: Sequence[str]) -> list[str]:
        command = self.cluster.machines.on(machine, [sys.executable, "-m", "moe.cli", *arguments])
        return [f"--wdns={self.folder}" if word.startswith("--wdns=") else word for word in command]

    def says(self, *arguments: str, code: int = 0) -> str:
        """What a verb prints."""
        process = self.turnout(*arguments)
        said = process.communicate(timeout=400)[0]
        assert process.returncode == code, said
        return said

    def launch(self, run: str, kind: str, *more: str, code: int = 0) -> str:
        return self.says("launch", "recipe.yaml", f"run_dir={run}", *LAYOUT[kind], *more, code=code)

    def start(self, run: str, kind: str, *more: str) -> "subprocess.Popen[str]":
        """A launch that is not waited for; what it says goes into a file, which never fills."""
        arguments = ["launch", "recipe.yaml", f"run_dir={run}", *LAYOUT[kind], *more]
        with (self.folder / f"{run.replace('/', '-')}.said").open("wb") as said:
            return subprocess.Popen(
                self._on(CONTROLLER, arguments), env=self.env(), stdout=said, stderr=said, text=True
            )

    def env(self) -> dict[str, str]:
        return {
            **os.environ,
            **self.cluster.env,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(HERE),
        }

    def files(self, run: str) -> LaunchFolder:
        return LaunchFolder(self.folder / run)

    def losses(self, run: str) -> dict[int, float]:
        """By step; every step once."""
        path = self.folder / run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        records: list[dict[str, Any]] = [record for record in map(json.loads, lines) if "loss" in record]
        assert len({record["step"] for record in records}) == len(records)
        return {record["step"]: record["loss"] for record in records}

    def weights(self, run: str) -> dict[str, str]:
        """Of the newest checkpoint the hash of every tensor, the optimizer's included."""
        newest = self.folder / run / "checkpoints" / f"step_{self.files(run).newest_step()}" / "manifest.json"
        tensors: dict[str, dict[str, str]] = json.loads(newest.read_text())["tensors"]
        return {name: page["xxh3"] for name, page in tensors.items()}

    def step(self, run: str) -> int:
        return max(self.losses(run), default=0)

    def taken(self, run: str, number: int) -> int:
        """Steps that every rank of an attempt has taken in it."""
        attempt, reports = self.files(run).attempt(number), self.files(run).reports(number)
        steps = [rank.step or 0 for report in reports for rank in report.ranks]
        return min(steps, default=0) - (attempt.from_step if attempt else 0)

    def attempts(self, run: str) -> list[Attempt]:
        return self.files(run).attempts()

    def pid(self, run: str, rank: int) -> tuple[str, int]:
        """Host, and pid there, of a rank of the attempt that runs."""
        reports = self.files(run).reports(self.attempts(run)[-1].number)
        return next((r.host, one.pid) for r in reports for one in r.ranks if one.rank == rank)

    def kill(self, run: str, rank: int, name: str) -> str:
        """Send a signal to a rank; its host."""
        host, pid = self.pid(run, rank)
        self.cluster.machines.run(host, ["kill", f"-{name}", str(pid)])
        return host

    def survivors(self, run: str) -> list[psutil.Process]:
        """Processes, on any machine, that belong to a run."""
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                if process.status() != psutil.STATUS_ZOMBIE and any(run in word for word in words):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def slurm(self, *command: str) -> str:
        return self.cluster.machines.run(CONTROLLER, command, env=self.env())

    def job(self, run: str) -> str:
        page: dict[str, str] = json.loads((self.files(run).home / "job.json").read_text())
        return page["job"]

    def job_state(self, run: str) -> str | None:
        said = self.slurm("scontrol", "--oneliner", "show", "job", self.job(run))
        return next((word[9:] for word in said.split() if word.startswith("JobState=")), None)


def wait(true: Callable[[], object], what: str, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "tc": "iproute2",
}


def faketime() -> Path | None:
    """A library that gives programs another clock."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


def lacking() -> str:
    """Install what the tests need and this box lacks, one process at a time; why they cannot run, or nothing."""
    if os.geteuid() != 0:
        return "the tests on a testbed make networks and mounts, for which one must be root"
    with (Path(tempfile.gettempdir()) / "turnout-packages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _install()


def _install() -> str:
    missing = {package for tool, package in PACKAGES.items() if shutil.which(tool) is None}
    if faketime() is None:
        missing.add("libfaketime")
    if not missing:
        return ""
    if shutil.which("apt-get") is None:
        return (
            f"the tests on a testbed need {', '.join(sorted(missing))}, and there is no apt-get to install it"
        )
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *sorted(missing)]
    # No daemon of these packages shall run on the box itself.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for command in (["apt-get", "update"], install):
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
            if done.returncode:
                return f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}"
    finally:
        if ours:
            policy.unlink()
    return ""


def _end(number: int, _: object) -> None:
    """So that all is cleaned up, and by a second signal, as `timeout` sends it, no less."""
    signal.signal(number, signal.SIG_IGN)
    pytest.exit("ended by SIGTERM")


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """With a file system of 4 MB in it, made before the machines are, so that they see it."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if why := lacking():
        pytest.skip(why)
    try:
        testbed.check(slurm=True)
    except LaunchError as error:
        pytest.skip(str(error))
    signal.signal(signal.SIGTERM, _end)
    home = Path(tempfile.mkdtemp(prefix="turnout-"))
    small = home / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], check=True)
    try:
        yield home
    finally:
        subprocess.run(["umount", str(small)], check=True)
        small.rmdir()
        home.rmdir()


@pytest.fixture(scope="session")
def small(home: Path) -> Path:
    """A file system of 4 MB that all machines see."""
    return home / "small"


@pytest.fixture(scope="session")
def cluster(home: Path) -> Iterator[Cluster]:
    machines = Machines.up(home / "testbed", 3)
    try:
        yield Cluster.up(machines, cpus=4, gpus=2)
    finally:
        machines.down()


@pytest.fixture(scope="session")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "data.yaml").write_text(yaml.safe_dump(DATA))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    place = Place(folder, cluster)
    place.says("prepare", "data.yaml")
    return place


@pytest.fixture(scope="session")
def long(place: Place) -> dict[int, float]:
    """The losses of a run of `LONG` steps on this machine alone, undisturbed."""
    place.launch("runs/local", "local", f"train.steps={LONG}")
    losses = place.losses("runs/local")
    assert sorted(losses) == list(range(1, LONG + 1))
    return losses


@pytest.fixture(scope="session")
def expected(long: dict[int, float]) -> dict[int, float]:
    """The losses of the run on this machine alone, undisturbed."""
    return {step: loss for step, loss in long.items() if step <= RECIPE["train"]["steps"]}
