"""A plan -> a batch script for Slurm; a job -> its nodes, its state, its requeue."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.folder import LaunchFolder, Plan
from moe import slurm
from moe.errors import LaunchError
from moe.slurm import cancel, submit, test

__all__ = ["Job", "Request", "cancel", "script", "state", "submit", "test"]


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
        """Raises `LaunchError` outside of Slurm."""
        number, nodelist = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NODELIST")
        if number is None or nodelist is None:
            raise LaunchError(
                "this run was planned for Slurm, but SLURM_JOB_ID is not set: we are in no job. "
                "Submit the script in the run's folder with sbatch, or launch it anew with --on hosts or local."
            )
        return cls(number, tuple(slurm.ask("scontrol", "show", "hostnames", nodelist).split()))

    def is_running(self) -> bool:
        """Whether Slurm has other plans for it already: then it is cancelled, completing or pending."""
        return state(self.number) == "RUNNING"

    def requeue(self, without: Sequence[str] = ()) -> None:
        """Back into the queue, and soon over here; `without` these nodes. Raises `LaunchError`."""
        if without:
            slurm.ask("scontrol", "requeuehold", self.number)
            slurm.ask("scontrol", "update", f"JobId={self.number}", f"ExcNodeList={','.join(without)}")
            slurm.ask("scontrol", "release", self.number)
        else:
            slurm.ask("scontrol", "requeue", self.number)


def state(job: str) -> str | None:
    """RUNNING, PENDING, CANCELLED, ...; None if Slurm knows the job no more."""
    try:
        said = slurm.ask("scontrol", "--oneliner", "show", "job", job)
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
