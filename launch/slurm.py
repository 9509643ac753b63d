"""Slurm's commands: a plan -> a batch script; a job -> its nodes, its state, its requeue."""

import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.folder import LaunchFolder, Plan
from moe.errors import LaunchError


@dataclass(frozen=True)
class Place:
    """Where in a cluster; None: Slurm's default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None

    @property
    def options(self) -> dict[str, str | None]:
        """By the names that Slurm's commands have for them."""
        return vars(self)


@dataclass(frozen=True)
class Request:
    """What Slurm is asked for beside nodes; None: its default."""

    name: str
    gpus_per_node: int = 0
    time: str | None = None
    place: Place = Place()
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
        """Raises `LaunchError` outside of Slurm."""
        number, nodelist = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NODELIST")
        if number is None or nodelist is None:
            raise LaunchError(
                "this run was planned for Slurm, but SLURM_JOB_ID is not set: we are in no job. "
                "Submit the script in the run's folder with sbatch, or launch it anew with --on hosts or local."
            )
        return cls(number, tuple(_ask("scontrol", "show", "hostnames", nodelist).split()))

    def is_running(self) -> bool:
        """Whether Slurm has other plans for it already: then it is cancelled, completing or pending."""
        return state(self.number) == "RUNNING"

    def requeue(self, without: Sequence[str] = ()) -> None:
        """Back into the queue, and soon over here; `without` these nodes. Raises `LaunchError`."""
        if without:
            _ask("scontrol", "requeuehold", self.number)
            _ask("scontrol", "update", f"JobId={self.number}", f"ExcNodeList={','.join(without)}")
            _ask("scontrol", "release", self.number)
        else:
            _ask("scontrol", "requeue", self.number)


def state(job: str) -> str | None:
    """RUNNING, PENDING, CANCELLED, ...; None if Slurm knows the job no more."""
    try:
        said = _ask("scontrol", "--oneliner", "show", "job", job)
    except LaunchError:
        return None
    return next((word[9:] for word in said.split() if word.startswith("JobState=")), None)


def script(folder: LaunchFolder, plan: Plan, request: Request, environment: Mapping[str, str]) -> str:
    """The batch script, which can be submitted by hand as well. Raises `LaunchError`: a value with a line break."""
    options = {
        "job-name": request.name,
        "nodes": plan.num_nodes + request.spares,
        "ntasks-per-node": 1,
        "cpus-per-task": None if plan.cpus_per_rank is None else plan.cpus_per_rank * plan.ranks_per_node,
        "gpus-per-node": request.gpus_per_node or None,
        "time": request.time,
        **request.place.options,
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


def submit(path: str) -> str:
    """Queue a batch script; the job's number. Raises `LaunchError`."""
    return _ask("sbatch", "--parsable", path).strip().partition(";")[0]


def cancel(job: str) -> None:
    """Raises `LaunchError`."""
    _ask("scancel", job)


@dataclass(frozen=True)
class Node:
    """What Slurm says of a node."""

    state: str
    """idle, mixed, allocated, down, drained, ...; with a `*` if it does not answer."""
    reason: str

    @property
    def _state(self) -> str:
        """Without the marks of power saving and maintenance, which don't make it unfit."""
        return self.state.rstrip("$#~+@%!^-")

    @property
    def is_out(self) -> bool:
        return self._state not in ("idle", "mixed", "allocated", "completing")

    @property
    def is_free(self) -> bool:
        return self._state in ("idle", "mixed", "completing")  # which is over soon


def nodes(place: Place) -> dict[str, Node]:
    """Of a partition, or all, by name; what is excluded is left out. Raises `LaunchError`."""
    asked = [] if place.partition is None else [f"--partition={place.partition}"]
    said = _ask("sinfo", "--noheader", "--Node", "--format=%N|%T|%E", *asked)
    excluded = set(_ask("scontrol", "show", "hostnames", place.exclude).split()) if place.exclude else set()
    rows = (line.split("|", 2) for line in said.splitlines())
    return {name: Node(state, reason) for name, state, reason in rows if name not in excluded}


def hold(names: Sequence[str], place: Place, gpus_per_node: int, seconds: float) -> str:
    """A job that does nothing on these nodes, so that steps can be run there; its number, once it runs.

    Raises `LaunchError` if it does not run in that time.
    """
    options = {
        "job-name": "turnout-doctor",
        "nodes": len(names),
        "nodelist": ",".join(names),
        "ntasks-per-node": 1,
        "gpus-per-node": gpus_per_node or None,
        "time": 10,
        "output": "/dev/null",
        "wrap": "sleep 600",
        **(place.options | {"exclude": None}),
    }
    job = _ask(
        "sbatch",
        "--parsable",
        "--no-requeue",
        *(f"--{name}={value}" for name, value in options.items() if value is not None),
    )
    job = job.strip().partition(";")[0]
    end = time.monotonic() + seconds
    while (now := state(job)) != "RUNNING":
        if time.monotonic() > end or now in ("CANCELLED", "FAILED", "COMPLETED"):
            cancel(job)
            raise LaunchError(
                f"Slurm did not start a job on {','.join(names)} within {seconds:.0f} s (it is {now}). Name fewer "
                f"nodes by --hosts, another --partition, or look at them from inside of a job of yours."
            )
        time.sleep(0.1)
    return job


def step(job: str, node: str) -> list[str]:
    """What comes before a command that shall run on one node of a job, beside all that runs there."""
    return [
        "srun",
        f"--jobid={job}",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={node}",
        "--overlap",
        "--cpu-bind=none",
    ]


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise LaunchError(
            f"{command[0]} is not there: this machine has no Slurm commands. Launch from a login node, "
            f"or try it on this machine with `turnout testbed up`."
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"`{shlex.join(command)}` gave no answer in 60 s. Is slurmctld up? Ask sinfo."
        ) from None
    if done.returncode:
        raise LaunchError(
            f"`{shlex.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}. "
            f"Correct what it names, or ask sinfo which partitions and nodes there are."
        )
    return done.stdout
