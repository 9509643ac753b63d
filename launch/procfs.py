"""A process -> what the kernel knows of it. Linux; elsewhere: nothing."""

import signal
from contextlib import suppress
from pathlib import Path


def status(pid: int, field_name: str) -> str:
    """A line of its status without the name, such as `State:`; empty if there is none."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith(field_name):
                return line.split(maxsplit=1)[1]
    return ""


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether it has a handler for the signal."""
    caught = status(pid, "SigCgt:") or "0"
    return bool(int(caught, 16) >> (number - 1) & 1)
