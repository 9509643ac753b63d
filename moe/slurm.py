"""Slurm's commands: options and lines -> a batch script; a script -> a job; a job -> what Slurm says of it."""

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from moe.errors import LaunchError

T = TypeVar("T")
_PATIENCE_SECONDS = 900.0
_RETRY_SECONDS = 2.0
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
_SILENCE = ("Unable to contact", "Socket timed out", "Communication connection failure", "Zero Bytes")
"""What Slurm's commands say when slurmctld does not answer, as while it is started anew."""


class SlurmSilentError(LaunchError):
    """slurmctld gave no answer: what was asked may be asked again."""


def script(options: Mapping[str, object], lines: Sequence[str]) -> str:
    """A batch script of `lines`; an option of None is Slurm's default. Raises `LaunchError`: a value with a line break.

    sbatch takes quotes in its lines as a shell does.
    """
    for name, value in options.items():
        if "\n" in str(value):
            raise LaunchError(
                f"--{name} is {str(value)!r}: in a batch script it has one line, and what follows would be run. Give "
                f"it without a line break."
            )
    asked = [
        f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None
    ]
    return "\n".join(["#!/usr/bin/env bash", *asked, *lines, ""])


def test(path: str) -> None:
    """Let Slurm check a batch script without queueing it. Raises `LaunchError` with what it says."""
    ask("sbatch", "--test-only", path)


def submit(path: str, *options: str) -> str:
    """Queue a batch script; the job's number. Raises `LaunchError`."""
    return ask("sbatch", "--parsable", *options, path).strip().partition(";")[0]


def cancel(job: str) -> None:
    """Raises `LaunchError`."""
    ask("scancel", job)


def show(job: str) -> str:
    """All that Slurm says of a job, as NAME=VALUE. Raises `LaunchError`."""
    return ask("scontrol", "--oneliner", "show", "job", job)


def field(page: str, name: str) -> str | None:
    """Of what `show` said."""
    return next((word.partition("=")[2] for word in page.split() if word.startswith(f"{name}=")), None)


def state(job: str) -> str | None:
    """RUNNING, PENDING, CANCELLED, ...; None if Slurm knows the job no more. Raises `SlurmSilentError`."""
    try:
        said = show(job)
    except SlurmSilentError:
        raise
    except LaunchError:
        return None
    return field(said, "JobState")


def patiently(ask: Callable[[], T]) -> T:
    """Ask again while slurmctld is silent. Raises `SlurmSilentError` after a quarter of an hour of it."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except SlurmSilentError:
            if time.monotonic() > end:
                raise
        time.sleep(_RETRY_SECONDS)


def ask(*command: str) -> str:
    """What a command prints. Raises `LaunchError`: no such command, or it failed; `SlurmSilentError`: no answer."""
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
