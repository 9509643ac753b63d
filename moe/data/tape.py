"""Arrays of token ids -> one line of them, end to end, and rows of its pieces. B rows, S positions of each."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from moe.data.indexed import Tokens

Table = tuple[Sequence[int], Sequence[int]]
"""Where the pieces of a row start, and their lengths."""


class Tape:
    """The ids of `arrays`, one after the other; nothing is copied."""

    def __init__(self, arrays: Sequence[Tokens]) -> None:
        # A memmap's slices cost several times a plain array's.
        self._arrays = [np.asarray(array) for array in arrays]
        # Buffers are cut and joined in a fraction of the time that arrays take.
        self._buffers = [array.data for array in self._arrays]
        self._ends = list(accumulate(map(len, arrays)))
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

    def rows(self, tables: Sequence[Table], size: int, pad_id: int) -> Tokens:
        """Ids [B, S], S = `size`: each row the pieces of its table, and padding for what they leave; read-only."""
        ends, begins, buffers = self._ends, self._begins, self._buffers
        dtype = self._arrays[0].dtype
        pad = np.array(pad_id, dtype).tobytes()
        parts: list[Any] = []  # buffers
        for starts, lengths in tables:
            for start, length in zip(starts, lengths, strict=True):
                stop, place = start + length, bisect_right(ends, start)
                # The rule comes first: a call would cost as much as all the rest.
                if stop <= ends[place]:
                    begin = begins[place]
                    parts.append(buffers[place][start - begin : stop - begin])
                else:
                    parts += self.views(start, stop)
            if (left := size - sum(lengths)) > 0:
                parts.append(pad * left)
        return np.frombuffer(b"".join(parts), dtype).reshape(len(tables), size)
