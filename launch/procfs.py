"""A process -> what the kernel knows of it; and a child that does not outlive its parent. Linux; elsewhere: nothing."""

import ctypes
import signal
import sys
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


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """To be called in a child: it gets the signal when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
