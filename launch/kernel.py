"""A process -> what Linux knows of it: its status, whether it hears a signal; and its end with its parent's."""

import ctypes
import signal
import sys
from contextlib import suppress
from pathlib import Path


def status(pid: int, field: str) -> str:
    """A line of /proc/PID/status, such as `State:`; empty if there is none."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith(field):
                return line.split(maxsplit=1)[1]
    return ""


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler by now; before that, most signals would end it."""
    return bool(int(status(pid, "SigCgt:") or "0", 16) >> (number - 1) & 1)


def end_with_parent(number: signal.Signals) -> None:
    """Ask the kernel to send this process a signal when its parent dies; to be called in the child."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
