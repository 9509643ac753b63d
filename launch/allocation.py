"""Slurm's nodes -> what it says of each; some of them held for a while, so that commands can be run there."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from launch.slurm import Place
from moe import slurm
from moe.errors import LaunchError


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
    said = slurm.ask("sinfo", "--noheader", "--Node", "--format=%N|%T|%E", *asked)
    excluded = (
        set(slurm.ask("scontrol", "show", "hostnames", place.exclude).split()) if place.exclude else set()
    )
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
    job = slurm.ask(
        "sbatch",
        "--parsable",
        "--no-requeue",
        *(f"--{name}={value}" for name, value in options.items() if value is not None),
    )
    job = job.strip().partition(";")[0]
    end = time.monotonic() + seconds
    while (now := slurm.state(job)) != "RUNNING":
        if time.monotonic() > end or now in ("CANCELLED", "FAILED", "COMPLETED"):
            slurm.cancel(job)
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
