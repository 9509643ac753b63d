"""Arrays of token ids -> one line of them, end to end: views of any stretch, and rows of many. S positions of a row."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from moe.data.indexed import Tokens


class Tape:
    """The ids of `arrays`, one after the other; nothing is copied."""

    def __init__(self, arrays: Sequence[Tokens]) -> None:
        # A memmap's slices cost several times a plain array's.
        self._arrays = [np.asarray(array) for array in arrays]
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

    def row(
        self, starts: Sequence[int], lengths: Sequence[int], size: int, pad_id: int
    ) -> npt.NDArray[np.int64]:
        """Ids [S] of pieces, S = `size`, and padding for what they leave."""
        parts: list[Tokens] = []
        for start, length in zip(starts, lengths, strict=True):
            parts += self.views(start, start + length)
        if (left := size - sum(lengths)) > 0:
            parts.append(np.full(left, pad_id, dtype=np.int64))
        ids_S: npt.NDArray[np.int64] = np.concatenate(parts, dtype=np.int64)
        return ids_S
