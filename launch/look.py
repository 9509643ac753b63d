"""A run folder -> what is going on in it, for people: status, logs, stop, explain."""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click

from launch import slurm, stragglers, surroundings
from launch.folder import Attempt, LaunchFolder, read, write_text
from launch.submit import job_of
from moe.errors import LaunchError

_run = click.argument("run", type=click.Path(path_type=Path))
_WATCH_SECONDS = 2.5


def alive(folder: LaunchFolder) -> str | None:
    """What trains there or waits to, in words; None: nothing. Takes seconds if somebody has trained there."""
    job = job_of(folder)
    if job is not None and (state := slurm_state(job)) in slurm.UNENDED:
        return f"job {job} of Slurm is {state}"
    running = [attempt for attempt in folder.attempts() if attempt.outcome is None]
    if not running:
        return None
    lease = folder.attempt_folder(running[-1].number) / "lease"
    before = _text(lease)
    end = time.monotonic() + _WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(0.1)
        if _text(lease) != before:
            return f"attempt {running[-1].number} counts its lease up"
    return None


def slurm_state(job: str) -> str | None:
    """As `slurm.state`; None as well where there are no Slurm commands."""
    try:
        return slurm.state(job)
    except LaunchError:
        return None


@click.command("status")
@_run
def status(run: Path) -> None:
    """Say whether RUN trains, on what, and how far it is. Exit code 0 if it is done or trains, else 1."""
    folder = LaunchFolder(run.absolute())
    plan, attempts = folder.plan(), folder.attempts()
    living = alive(folder)
    done = read(folder.done)
    if living is not None:
        click.echo(f"training: {living}")
    elif done is not None:
        click.echo(f"done: {done['step']} steps, {done['tokens']:,} tokens")
    else:
        click.echo("not training, not done")
    if attempts:
        attempt = attempts[-1]
        click.echo(
            f"attempt {attempt.number} of {plan.sized(attempt).world_size} ranks on {', '.join(attempt.nodes)}; "
            f"newest checkpoint: step {folder.newest_step()}"
        )
        for report in folder.reports(attempt.number):
            for rank in report.ranks:
                state = "alive" if rank.code is None else f"ended with {rank.code}"
                click.echo(
                    f"  rank {rank.rank} on {report.host}: step {rank.step or 0}, {state}, pid {rank.pid}"
                )
        for line in stragglers.sentences(folder.reports(attempt.number)):
            click.echo(line)
    sys.exit(0 if living or done else 1)


@click.command("logs")
@_run
@click.option("--rank", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--attempt", type=click.IntRange(min=1), help="The last, if not given.")
@click.option("--follow", "-f", is_flag=True, help="Go on as it grows, until Ctrl-C.")
def logs(run: Path, rank: int, attempt: int | None, follow: bool) -> None:
    """Print what a rank of RUN said."""
    folder = LaunchFolder(run.absolute())
    folder.plan()
    attempts = folder.attempts()
    if not attempts:
        raise LaunchError(f"{run} has had no attempt yet. `turnout status {run}` says what it waits for.")
    path = folder.log(attempt or attempts[-1].number, rank)
    if not path.is_file():
        there = sorted(other.name for other in folder.logs(attempt or attempts[-1].number).glob("*"))
        raise LaunchError(f"{path} is not there. That attempt has {', '.join(there) or 'no logs'}.")
    with suppress(KeyboardInterrupt), path.open(encoding="utf-8", errors="replace") as file:
        while True:
            click.echo(file.read(), nl=False)
            if not follow:
                return
            time.sleep(0.2)


@click.command("stop")
@_run
@click.option("--wait", "seconds", type=click.FloatRange(min=0), default=600.0, show_default=True)
def stop(run: Path, seconds: float) -> None:
    """Let RUN finish its step, save and end; wait for it. The same launch goes on from there."""
    folder = LaunchFolder(run.absolute())
    folder.plan()
    living = alive(folder)
    if living is None:
        click.echo("nothing trains there")
        return
    write_text(folder.stop, "stop\n")
    job = job_of(folder)
    if job is not None and slurm_state(job) == "PENDING":
        slurm.cancel(job)
    end = time.monotonic() + seconds
    while (living := alive(folder)) is not None:
        if time.monotonic() > end:
            raise LaunchError(f"after {seconds:.0f} s {living}. Wait on, or look at `turnout logs {run}`.")
    click.echo(f"stopped; newest checkpoint: step {folder.newest_step()}")


@click.command("explain")
@_run
def explain(run: Path) -> None:
    """Say in a few lines what happened to RUN: attempts, first failing rank and host, cause, what was done."""
    folder = LaunchFolder(run.absolute())
    folder.plan()
    for line in story(folder):
        click.echo(line)


def story(folder: LaunchFolder) -> Iterator[str]:
    """The lines of `explain`."""
    attempts = folder.attempts()
    if not attempts:
        yield "no attempt yet"
    for before, attempt in zip([None, *attempts], attempts, strict=False):
        yield _sentence(attempt)
        yield from _changes(folder, before, attempt)
        yield from (f"    {line}" for line in stragglers.sentences(folder.reports(attempt.number)))
        if attempt.outcome in ("failed", "hung", "refused") and attempt.rank is not None:
            yield from _last_words(folder.log(attempt.number, attempt.rank))
    done = read(folder.done)
    if done is not None:
        yield f"done: {done['step']} steps, {done['tokens']:,} tokens"
    elif attempts:
        yield f"not done; newest checkpoint: step {folder.newest_step()}"


def _sentence(attempt: Attempt) -> str:
    on = f"on {', '.join(attempt.nodes)}" + (f" (job {attempt.job})" if attempt.job else "")
    fitted = f" with {', '.join(attempt.overrides)}" if attempt.overrides else ""
    begin = f"attempt {attempt.number} {on} from step {attempt.from_step}{fitted}"
    if attempt.outcome is None or attempt.ended is None:
        return f"{begin}: no end is known; it runs, or its supervisor was killed"
    took = f"after {attempt.ended - attempt.began:.0f} s at step {attempt.last_step or attempt.from_step}"
    who = f": rank {attempt.rank} on {attempt.host}" if attempt.rank is not None else ""
    cause = f": {attempt.cause}" if attempt.cause else ""
    lost = ""
    if attempt.outcome not in ("done", "saved"):
        lost = f"; {max(0, (attempt.last_step or 0) - (attempt.to_step or 0))} steps lost"
    return f"{begin}: {attempt.outcome} {took}{who}{cause}{lost}; {attempt.then or 'no more is known'}"


def _changes(folder: LaunchFolder, before: Attempt | None, attempt: Attempt) -> Iterator[str]:
    """What it ran in and the one before did not."""
    was = None if before is None else surroundings.of(folder, before.number)
    now = surroundings.of(folder, attempt.number)
    if before is not None and was is not None and now is not None:
        changes = list(surroundings.differences(was, now))
        if changes:
            yield f"    since attempt {before.number}: {'; '.join(changes)}"


def _last_words(path: Path) -> Iterator[str]:
    lines = [line for line in (_text(path) or "").splitlines() if line.strip()]
    if lines:
        yield f"    its last words: {lines[-1][:200]}"


def _text(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return None
