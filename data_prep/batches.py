"""Documents one after the other -> lists of a megabyte, as they are marked and encoded."""

from collections.abc import Callable
from dataclasses import dataclass, field

BATCH_BYTES = 1_000_000
"""Of text treated at a time; more is no faster, and takes several times its room more."""


@dataclass
class Batches:
    """Hands lists of documents to `take`."""

    take: Callable[[list[bytes]], None]
    _texts: list[bytes] = field(default_factory=list)
    _waiting: int = 0

    def add(self, text: bytes, _row: int) -> None:
        """A document of UTF-8."""
        self._texts.append(text)
        self._waiting += len(text)
        if self._waiting >= BATCH_BYTES:
            self.close()

    def close(self) -> None:
        """Hand on what is left."""
        texts, self._texts, self._waiting = self._texts, [], 0
        self.take(texts)
