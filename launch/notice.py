"""A job -> why it is to save and leave, asked of Slurm beside the training.

Slurm tells no job that a node of it is being drained: it waits for the job's end, which may be days away. That it
preempts a job it tells the steps that run at that moment, so that nobody hears of it between two attempts.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from moe.errors import LaunchError

_SECONDS = 5.0


@dataclass
class Notice:
    """What was answered last. Make one with `watching`."""

    ask: Callable[[], str | None]
    """May take long, and may raise `LaunchError`: then the last answer holds."""
    why: str | None = None
    """In words; None: nobody wants it to leave."""

    @classmethod
    @contextmanager
    def watching(cls, ask: Callable[[], str | None] | None, seconds: float = _SECONDS) -> Iterator["Notice"]:
        """One that asks again every so many seconds, in a thread; None: nobody is to be asked."""
        notice, over = cls(ask or (lambda: None)), threading.Event()
        thread = threading.Thread(target=notice._watch, args=(over, seconds), daemon=True)
        if ask is not None:
            thread.start()
        try:
            yield notice
        finally:
            over.set()  # the thread may be waiting for an answer, and we do not wait for it

    def _watch(self, over: threading.Event, seconds: float) -> None:
        while not over.wait(seconds):
            with suppress(LaunchError):
                self.why = self.ask()
