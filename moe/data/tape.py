"""Arrays of token ids -> one line of them, end to end, and pieces of it. N ids."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain
from operator import add
from typing import Any

import numpy as np

from moe.data.indexed import Tokens


class Tape:
    """The ids of `arrays`, one after the other; nothing is copied."""

    def __init__(self, arrays: Sequence[Tokens]) -> None:
        # A memmap's slices cost several times a plain array's. What an empty file would hold, nobody knows.
        self._arrays = [np.asarray(array) for array in arrays if len(array)]
        # Buffers are cut and joined in a fraction of the time that arrays take.
        self._buffers = [array.data for array in self._arrays]
        self._are_alike = len({array.dtype for array in self._arrays}) == 1
        self._ends = list(accumulate(map(len, self._arrays)))
        self._begins = [0, *self._ends]

    def __len__(self) -> int:
        return self._begins[-1]

    def views(self, start: int, stop: int) -> list[Tokens]:
        """What lies from `start` to `stop`; more than one where arrays meet. Raises `IndexError` beyond the ends."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"{start} to {stop} of {len(self)}")
        place = bisect_right(self._ends, start)
        parts = []
        while start < stop:
            begin, end = self._begins[place], min(stop, self._ends[place])
            parts.append(self._arrays[place][start - begin : end - begin])
            start, place = end, place + 1
        return parts

    def pieces(self, starts: Sequence[int], lengths: Sequence[int]) -> Tokens:
        """Ids `[sum(lengths)]`: what lies from each start on, end to end; read-only.

        Raises `IndexError` beyond the ends.
        """
        parts: list[Any]  # buffers
        if not self._are_alike:
            return self._converted(starts, lengths)
        if len(self._buffers) == 1:
            buffer = self._buffers[0]
            parts = [buffer[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        else:
            parts = self._across(starts, lengths)
        found_N = np.frombuffer(b"".join(parts), self._arrays[0].dtype)
        if len(found_N) != sum(lengths):
            raise IndexError(f"pieces end at {max(map(add, starts, lengths))} of {len(self)}")
        return found_N

    def _across(self, starts: Sequence[int], lengths: Sequence[int]) -> list[Any]:
        """The same as buffers, of several arrays."""
        ends, begins, buffers = self._ends, self._begins, self._buffers
        parts: list[Any] = []
        for start, length in zip(starts, lengths, strict=True):
            stop, place = start + length, bisect_right(ends, start)
            # The rule comes first: a call would cost as much as all the rest.
            if place < len(ends) and stop <= ends[place]:
                begin = begins[place]
                parts.append(buffers[place][start - begin : stop - begin])
            else:
                parts += self.views(start, stop)
        return parts

    def _converted(self, starts: Sequence[int], lengths: Sequence[int]) -> Tokens:
        """The same where arrays are of several dtypes, of one that holds all their ids."""
        none = np.empty(0, dtype=np.result_type(*self._arrays) if self._arrays else np.int32)
        views = (self.views(start, start + length) for start, length in zip(starts, lengths, strict=True))
        return np.concatenate([none, *chain.from_iterable(views)])
