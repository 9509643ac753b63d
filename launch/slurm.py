"""A plan -> a batch script for Slurm; a job -> its nodes, its state, its requeue."""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from launch.folder import LaunchFolder, Plan
from moe import slurm
from moe.errors import LaunchError
from moe.slurm import SlurmSilentError, cancel, field, show, state, submit, test

__all__ = [
    "UNENDED",
    "Job",
    "Request",
    "SlurmSilentError",
    "ask_to_save",
    "cancel",
    "check_time",
    "field",
    "free",
    "script",
    "show",
    "state",
    "submit",
    "test",
]

UNENDED = ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")
"""States of a job that Slurm is not yet done with."""


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
        """Raises `LaunchError` outside of Slurm, and if slurmctld is silent for long."""
        number, nodelist = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NODELIST")
        if number is None or nodelist is None:
            raise LaunchError(
                "this run was planned for Slurm, but SLURM_JOB_ID is not set: we are in no job. "
                "Submit the script in the run's folder with sbatch, or launch it anew with --on hosts or local."
            )
        names = slurm.patiently(lambda: slurm.ask("scontrol", "show", "hostnames", nodelist))
        return cls(number, tuple(names.split()))

    def is_running(self) -> bool:
        """Whether Slurm has no other plans for it: else it is cancelled, completing or pending.

        Raises `LaunchError` if slurmctld is silent for long.
        """
        return slurm.patiently(lambda: state(self.number)) == "RUNNING"

    def requeue(self) -> None:
        """Back into the queue, and soon over here. Raises `LaunchError`."""
        # Shielded from the SIGTERM that it brings about.
        slurm.patiently(
            lambda: slurm.ask("sh", "-c", "trap '' TERM; exec scontrol requeue \"$0\"", self.number)
        )

    def submit_without(self, path: str, nodes: Sequence[str]) -> str:
        """Queue its script as another job, without these nodes and those that it was without; the job's number.

        A requeue would wait until Slurm itself has given up a node that is dead, and Slurm 22.05 then forgets the
        job's GPUs: it lets no step of it begin, and frees them for nobody. Raises `LaunchError`.
        """
        page = slurm.patiently(lambda: slurm.show(self.number))
        before = slurm.field(page, "ExcNodeList")
        without = ",".join([*nodes, *([] if before in (None, "(null)") else [str(before)])])
        return slurm.patiently(lambda: submit(path, *([f"--exclude={without}"] if without else [])))

    def notice(self) -> str | None:
        """Why it is to save and leave, though it runs; None: it may stay. Raises `LaunchError`."""
        page = slurm.show(self.number)
        preempted, started = (slurm.field(page, name) for name in ("PreemptTime", "StartTime"))
        if preempted not in (None, "None") and str(preempted) >= str(started):  # not before it was requeued
            return "preemption"
        drained = ", ".join(sorted(self.drained()))
        return f"drain of {drained}" if drained else None

    def drained(self) -> frozenset[str]:
        """Those of its nodes that an administrator wants free: Slurm starts nothing there, and ends nothing.

        Raises `LaunchError`.
        """
        return frozenset(node for node, state in self._states().items() if state.startswith("drain"))

    def has_given_up(self, nodes: Iterable[str]) -> bool:
        """Whether Slurm has noticed of all these, which are its nodes, that they are dead.

        Raises `LaunchError` if slurmctld is silent for long.
        """
        states = slurm.patiently(self._states)
        return all(states.get(node, "").startswith("down") for node in nodes)

    def _states(self) -> dict[str, str]:
        said = slurm.ask("sinfo", "--noheader", "-N", "-n", ",".join(self.nodes), "-o", "%N %T")
        return dict(line.split() for line in said.splitlines())


def check_time(limit: str, signal_seconds: int) -> None:
    """Refuse a time limit that Slurm would not read, or that leaves none to train in. Raises `LaunchError`."""
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return
    match = re.fullmatch(
        r"(?:(?P<d>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?"
        r"|(?:(?:(?P<H>\d+):)?(?P<M>\d+):(?P<S>\d+))|(?P<minutes>\d+))",
        limit,
    )
    if match is None:
        raise LaunchError(
            f"--time is {limit!r}, but must be D-HH:MM:SS, HH:MM:SS or a number of minutes. Write --time 4:00:00 for "
            f"four hours, or leave it out to get the partition's limit."
        )
    part = {name: int(text or 0) for name, text in match.groupdict().items()}
    hours, minutes = part["d"] * 24 + part["h"] + part["H"], part["m"] + part["M"] + part["minutes"]
    seconds = (hours * 60 + minutes) * 60 + part["s"] + part["S"]
    if seconds <= signal_seconds:
        raise LaunchError(
            f"--time is {limit}, {seconds} s, but --signal-before lets the ranks save {signal_seconds} s before it: "
            f"none is left to train in. Use a longer --time or a smaller --signal-before."
        )


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
        "time": request.time,
        **request.place.options,
        "signal": f"B:USR1@{request.signal_seconds}",
        "open-mode": "append",
        "output": folder.run / "logs" / "slurm-%j.log",
    }
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return slurm.script(
        options,
        [
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
        ],
    )


def ask_to_save(job: str) -> None:
    """As Slurm does before the time limit: the supervisor lets the ranks save, and requeues. Raises `LaunchError`."""
    slurm.ask("scancel", "--signal=USR1", "--batch", job)


def free(job: str) -> bool:
    """Let a job run that Slurm holds back in the queue; whether it did. Raises `LaunchError`."""
    reason = slurm.field(slurm.show(job), "Reason") or ""
    held = "held" in reason.lower()
    if held:
        slurm.ask("scontrol", "release", job)
    return held
