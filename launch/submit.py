"""A script in a run folder -> a job in Slurm's queue; and back into the queue: `turnout requeue`."""

import time
from dataclasses import replace
from pathlib import Path

import click

from launch import slurm
from launch.folder import LaunchFolder, Plan, read, write
from moe.errors import LaunchError

_ASK_SECONDS = 5.0
_POLL_SECONDS = 0.25


def submit(folder: LaunchFolder) -> str:
    """Let Slurm check the script and queue it; the job's number, kept in the folder. Raises `LaunchError`."""
    path, page = str(folder.home / "job.sbatch"), folder.home / "job.json"
    page.unlink(missing_ok=True)
    slurm.test(path)
    job = slurm.submit(path)
    write(page, {"job": job})
    return job


def job_of(folder: LaunchFolder) -> str | None:
    """Slurm's number of the run's job, if it was ever submitted."""
    page = read(folder.home / "job.json")
    return None if page is None else str(page["job"])


@click.command("requeue")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--wait", "seconds", type=click.FloatRange(min=0), default=600.0, show_default=True)
def requeue(run: Path, seconds: float) -> None:
    """Put RUN back into Slurm's queue: if it trains, it saves first; if its job has ended, it is submitted anew.

    It goes on from its newest checkpoint, on as many nodes as Slurm then gives it.
    """
    folder = LaunchFolder(run.absolute())
    plan = folder.plan()
    if plan.kind != "slurm":
        raise LaunchError(
            f"{run} was launched --on {plan.kind}, where there is no queue. End it by `turnout stop {run}` and "
            f"launch it again."
        )
    job = job_of(folder)
    state = None if job is None else slurm.state(job)
    if job is None or state not in slurm.UNENDED:
        click.echo(f"{run} is queued anew as job {_anew(folder, plan, run)}")
    elif state == "RUNNING":
        state = _save_first(job, run, seconds)
        now, saved = job_of(folder), f"newest checkpoint: step {folder.newest_step()}"
        if now != job:  # it left a node that was lost
            click.echo(f"{run} is queued anew as job {now}; {saved}")
        elif state not in slurm.UNENDED:
            raise LaunchError(f"job {job} is {state}, not queued. See `turnout explain {run}`.")
        else:
            click.echo(f"job {job} is back in the queue; {saved}")
    elif state == "PENDING":
        held = slurm.free(job)
        click.echo(f"job {job} {'was held in the queue and is free' if held else 'is in the queue already'}")
    else:
        raise LaunchError(f"job {job} of Slurm is {state}. Wait until it is not, and ask again.")


def _anew(folder: LaunchFolder, plan: Plan, run: Path) -> str:
    if folder.done.exists():
        raise LaunchError(
            f"{run} is done: there is nothing to go on with. Raise train.steps and launch it again to train longer."
        )
    folder.stop.unlink(missing_ok=True)
    folder.write_plan(replace(plan, first_attempt=len(folder.attempts()) + 1))
    return submit(folder)


def _save_first(job: str, run: Path, seconds: float) -> str | None:
    """Ask again and again, for the supervisor may not listen yet, until the job runs no more; its state then."""
    end, asked = time.monotonic() + seconds, 0.0
    while (state := slurm.state(job)) == "RUNNING":
        if time.monotonic() > end:
            raise LaunchError(
                f"after {seconds:.0f} s job {job} runs on. Wait on, or look at `turnout logs {run}`."
            )
        if time.monotonic() - asked > _ASK_SECONDS:
            slurm.ask_to_save(job)
            asked = time.monotonic()
        time.sleep(_POLL_SECONDS)
    return state
