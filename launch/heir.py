"""An agent whose supervisor is gone -> another job for the run.

The supervisor lives on the job's first node. When that dies, Slurm takes it out of the job, which we ask it to outlive
the loss of a node, and lets the rest wait for the time limit with nobody in charge. So the agents that are left look
after the run: the first of them queues it anew, without the node, and ends the job.
"""

import time

from launch import slurm
from launch.awake import Awake
from launch.folder import LaunchFolder, write
from moe.errors import LaunchError

_POLL_SECONDS = 0.2


def is_gone(folder: LaunchFolder, number: int, seconds: float) -> bool:
    """Whether the supervisor counts up no lease for so long; False once it says that all is over."""
    clock = Awake()
    home, last, end = folder.attempt_folder(number), "", seconds
    while clock.seconds() < end:
        try:
            if (home / "order").exists() and (home / "order").read_text(encoding="utf-8").strip() == "end":
                return False
            lease = (home / "lease").read_text(encoding="utf-8")
        except OSError:
            lease = last
        if lease != last:
            last, end = lease, clock.seconds() + seconds
        time.sleep(_POLL_SECONDS)
    return not folder.attempt_folder(number + 1).exists()


def inherit(folder: LaunchFolder, number: int, host: str) -> str | None:
    """Queue the run anew and end this job; the new job's number. None: another agent does, or the job is ended anyhow.

    Raises `LaunchError` if Slurm refuses.
    """
    job = slurm.Job.mine()
    page = slurm.show(job.number)
    if slurm.field(page, "JobState") != "RUNNING":
        return None
    try:
        with (folder.attempt_folder(number) / "heir").open("x", encoding="utf-8") as file:
            file.write(f"{host}\n")
    except FileExistsError:
        return None
    dead = slurm.field(page, "BatchHost")
    if dead is None:
        raise LaunchError(
            f"Slurm does not say where job {job.number} began. Ask scontrol show job {job.number}."
        )
    new = job.submit_without(str(folder.home / "job.sbatch"), [dead])
    write(folder.home / "job.json", {"job": new})
    slurm.cancel(job.number)
    return new
