"""A child process -> one that does not outlive its parent. Linux; elsewhere: nothing."""

import ctypes
import signal
import sys
from contextlib import suppress


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """To be called in a child: it gets the signal when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        with suppress(OSError):
            ctypes.CDLL(None).prctl(1, number)
