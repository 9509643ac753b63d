"""A job's nodes -> those that an administrator wants free, asked of Slurm beside the training.

Slurm tells no job that a node of it is being drained; it waits for the job's end, which may be days away.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from moe.errors import LaunchError

_SECONDS = 10.0


@dataclass
class DrainWatch:
    """What was answered last. Make one with `watching`."""

    ask: Callable[[], frozenset[str]]
    """May take long, and may raise `LaunchError`: then the last answer holds."""
    nodes: frozenset[str] = frozenset()

    @classmethod
    @contextmanager
    def watching(
        cls, ask: Callable[[], frozenset[str]] | None, seconds: float = _SECONDS
    ) -> Iterator["DrainWatch"]:
        """One that asks again every so many seconds, in a thread; None: nobody is to be asked."""
        watch, over = cls(ask or frozenset), threading.Event()
        thread = threading.Thread(target=watch._watch, args=(over, seconds), daemon=True)
        if ask is not None:
            thread.start()
        try:
            yield watch
        finally:
            over.set()  # the thread may be waiting for an answer, and we do not wait for it

    def wants(self) -> str | None:
        """In words, if any node is to be freed."""
        return f"drain of {', '.join(sorted(self.nodes))}" if self.nodes else None

    def _watch(self, over: threading.Event, seconds: float) -> None:
        while not over.wait(seconds):
            with suppress(LaunchError):
                self.nodes = self.ask()
