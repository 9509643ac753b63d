"""Slurm's commands: a plan -> a batch script; a job -> its nodes, its state, its requeue."""

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from launch.folder import LaunchFolder, Plan
from moe.errors import LaunchError

T = TypeVar("T")
_PATIENCE_SECONDS = 900.0
_RETRY_SECONDS = 2.0
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
_SILENCE = ("Unable to contact", "Socket timed out", "Communication connection failure", "Zero Bytes")
"""What Slurm's commands say when slurmctld does not answer, as while it is started anew."""

UNENDED = ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")
"""States of a job that Slurm is not yet done with."""


class SlurmSilentError(LaunchError):
    """slurmctld gave no answer: what was asked may be asked again."""


@dataclass(frozen=True)
class Request:
    """What Slurm is asked for beside nodes; None: its default."""

    name: str
    gpus_per_node: int = 0
    partition: str | None = None
    time: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    spares: int = 0
    """Nodes beyond those that train, for one that dies."""
    signal_seconds: int = 300
    """How long before the time limit the ranks save and the job is requeued."""
    modules: tuple[str, ...] = ()
    """To be loaded by `module load`."""


@dataclass(frozen=True)
class Job:
    """The job that this process runs in."""

    number: str
    nodes: tuple[str, ...]

    @classmethod
    def mine(cls) -> "Job":
        """Raises `LaunchError` outside of Slurm, and if slurmctld is silent for long."""
        number, nodelist = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NODELIST")
        if number is None or nodelist is None:
            raise LaunchError(
                "this run was planned for Slurm, but SLURM_JOB_ID is not set: we are in no job. "
                "Submit the script in the run's folder with sbatch, or launch it anew with --on hosts or local."
            )
        names = _patiently(lambda: _ask("scontrol", "show", "hostnames", nodelist))
        return cls(number, tuple(names.split()))

    def is_running(self) -> bool:
        """Whether Slurm has no other plans for it: else it is cancelled, completing or pending.

        Raises `LaunchError` if slurmctld is silent for long.
        """
        return _patiently(lambda: state(self.number)) == "RUNNING"

    def requeue(self) -> None:
        """Back into the queue, and soon over here. Raises `LaunchError`."""
        # Shielded from the SIGTERM that it brings about.
        _patiently(lambda: _ask("sh", "-c", "trap '' TERM; exec scontrol requeue \"$0\"", self.number))

    def submit_without(self, path: str, nodes: Sequence[str]) -> str:
        """Queue its script as another job, without these nodes and those that it was without; the job's number.

        A requeue would wait until Slurm itself has given up a node that is dead, and Slurm 22.05 then forgets the
        job's GPUs. Raises `LaunchError`.
        """
        page = _patiently(lambda: show(self.number))
        before = field(page, "ExcNodeList")
        without = ",".join([*nodes, *([] if before in (None, "(null)") else [str(before)])])
        return _patiently(lambda: submit(path, f"--exclude={without}"))

    def drained(self) -> frozenset[str]:
        """Those of its nodes that an administrator wants free: Slurm starts nothing there, and ends nothing.

        Raises `LaunchError`.
        """
        said = _ask("sinfo", "--noheader", "-N", "-n", ",".join(self.nodes), "-o", "%N %T")
        states = dict(line.split() for line in said.splitlines())
        return frozenset(node for node, state in states.items() if state.startswith("drain"))


def state(job: str) -> str | None:
    """RUNNING, PENDING, CANCELLED, ...; None if Slurm knows the job no more. Raises `SlurmSilentError`."""
    try:
        said = show(job)
    except SlurmSilentError:
        raise
    except LaunchError:
        return None
    return field(said, "JobState")


def script(folder: LaunchFolder, plan: Plan, request: Request, environment: Mapping[str, str]) -> str:
    """The batch script, which can be submitted by hand as well. Raises `LaunchError`: a value with a line break."""
    most = plan.num_nodes + request.spares
    options = {
        "job-name": request.name,
        "nodes": most if plan.min_nodes is None else f"{plan.min_nodes}-{most}",
        # With it, and with a choice of nodes, Slurm takes the fewest; without, as many as are free.
        "ntasks-per-node": 1 if plan.min_nodes is None else None,
        "cpus-per-task": None if plan.cpus_per_rank is None else plan.cpus_per_rank * plan.ranks_per_node,
        "gpus-per-node": request.gpus_per_node or None,
        "partition": request.partition,
        "time": request.time,
        "account": request.account,
        "qos": request.qos,
        "constraint": request.constraint,
        "exclude": request.exclude,
        "signal": f"B:USR1@{request.signal_seconds}",
        "open-mode": "append",
        "output": folder.run / "logs" / "slurm-%j.log",
    }
    for name, value in options.items():
        if "\n" in str(value):
            raise LaunchError(
                f"--{name} is {str(value)!r}: in a batch script it has one line, and what follows would be run. Give "
                f"it without a line break."
            )
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *lines,
            "#SBATCH --requeue",
            "#SBATCH --no-kill",
            "#",
            f"# Written by `turnout launch`; submit it with: sbatch {shlex.quote(str(folder.home / 'job.sbatch'))}",
            "# The supervisor starts one agent a node with srun. Before the time limit Slurm sends it USR1: the ranks",
            "# save at the same step, and it requeues the job. It also starts anew what failed.",
            "set -euo pipefail",
            "trap '' USR1  # until the supervisor listens",
            f"cd {shlex.quote(plan.working_folder)}",
            *(f"module load {shlex.quote(module)}" for module in request.modules),
            *exports,
            f"exec {shlex.join([plan.python, '-u', '-m', 'launch.supervise', str(folder.run)])}",
            "",
        ]
    )


def test(path: str) -> None:
    """Let Slurm check a batch script without queueing it. Raises `LaunchError` with what it says."""
    _ask("sbatch", "--test-only", path)


def submit(path: str, *options: str) -> str:
    """Queue a batch script; the job's number. Raises `LaunchError`."""
    return _ask("sbatch", "--parsable", *options, path).strip().partition(";")[0]


def cancel(job: str) -> None:
    """Raises `LaunchError`."""
    _ask("scancel", job)


def ask_to_save(job: str) -> None:
    """As Slurm does before the time limit: the supervisor lets the ranks save, and requeues. Raises `LaunchError`."""
    _ask("scancel", "--signal=USR1", "--batch", job)


def free(job: str) -> bool:
    """Let a job run that Slurm holds back in the queue; whether it did. Raises `LaunchError`."""
    reason = field(show(job), "Reason") or ""
    held = "held" in reason.lower()
    if held:
        _ask("scontrol", "release", job)
    return held


def show(job: str) -> str:
    """All that Slurm says of a job, as NAME=VALUE. Raises `LaunchError`."""
    return _ask("scontrol", "--oneliner", "show", "job", job)


def field(page: str, name: str) -> str | None:
    """Of what `show` said."""
    return next((word.partition("=")[2] for word in page.split() if word.startswith(f"{name}=")), None)


def _patiently(ask: Callable[[], T]) -> T:
    """Ask again while slurmctld is silent. Raises `SlurmSilentError` after a quarter of an hour of it."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except SlurmSilentError:
            if time.monotonic() > end:
                raise
        time.sleep(_RETRY_SECONDS)


def _ask(*command: str) -> str:
    # What Slurm told this job must not be taken for what another is to get.
    env = {
        name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in _KEPT
    }
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise LaunchError(
            f"{command[0]} is not there: this machine has no Slurm commands. Launch from a login node, "
            f"or try it on this machine with `turnout testbed up`."
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmSilentError(
            f"`{shlex.join(command)}` gave no answer in 60 s. Is slurmctld up? Ask sinfo."
        ) from None
    if done.returncode and any(word in done.stderr for word in _SILENCE):
        raise SlurmSilentError(
            f"`{shlex.join(command)}` reached no slurmctld: {done.stderr.strip()}. Is it up? Ask sinfo."
        )
    if done.returncode:
        raise LaunchError(
            f"`{shlex.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}. "
            f"Correct what it names, or ask sinfo which partitions and nodes there are."
        )
    return done.stdout
