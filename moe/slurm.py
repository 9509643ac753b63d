"""Slurm's commands: options and lines -> a batch script; a script -> a job; a job -> what Slurm says of it."""

import shlex
import subprocess
from collections.abc import Mapping, Sequence

from moe.errors import LaunchError


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


def submit(path: str) -> str:
    """Queue a batch script; the job's number. Raises `LaunchError`."""
    return ask("sbatch", "--parsable", path).strip().partition(";")[0]


def cancel(job: str) -> None:
    """Raises `LaunchError`."""
    ask("scancel", job)


def ask(*command: str) -> str:
    """What a command prints. Raises `LaunchError`: no such command, no answer, or it failed."""
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
