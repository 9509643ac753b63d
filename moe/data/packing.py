"""Lengths of documents -> rows that hold them, best-fit; integers only, no files.

A document that fits a row is never cut. Of a longer one, pieces as long as a row are rows of their own, and what is
left is packed like a document. Best-fit decreasing (arXiv:2404.10830, section 3): longest first, each into the fullest
row that still takes it, else into a new one. Equal sizes are dealt with at once, so the work grows with the number of
different sizes, not of documents.

D documents, P pieces, R rows, S positions in a row.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

Integers = npt.NDArray[np.integer[Any]]
_CHUNK = 1 << 22
"""Documents packed with one another: more would fill rows no better, and take memory."""


@dataclass(frozen=True)
class Pieces:
    """What lies in each row, in order: `row_R1[i]` to `row_R1[i + 1]` are the pieces of row i."""

    start_P: npt.NDArray[np.int64]
    """First token of each piece, counted from the first document on."""
    length_P: npt.NDArray[np.int32]
    row_R1: npt.NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        return len(self.row_R1) - 1


def pack(length_D: Integers, row_length: int, seed: int) -> Pieces:
    """Rows of `row_length` for documents that lie end to end. Of documents of equal size the seed says which meet."""
    parts, first = [], 0
    for number, at in enumerate(range(0, len(length_D), _CHUNK)):
        here_D = np.asarray(length_D[at : at + _CHUNK], dtype=np.int64)
        parts.append(_packed(here_D, first, row_length, f"packing {seed} {number}"))
        first += int(here_D.sum())
    starts, lengths, pieces_a_row = ([part[which] for part in parts] for which in range(3))
    row_R1 = np.concatenate([np.zeros(1, dtype=np.int64), *pieces_a_row]).cumsum(dtype=np.int64)
    return Pieces(
        np.concatenate([np.zeros(0, dtype=np.int64), *starts]),
        np.concatenate([np.zeros(0, dtype=np.int32), *lengths]),
        row_R1,
    )


def _packed(
    length_D: npt.NDArray[np.int64], first: int, row_length: int, salt: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Starts and lengths of pieces, row by row, and how many each row has."""
    start_D = first + np.cumsum(length_D) - length_D
    whole_D, rest_D = np.divmod(length_D, row_length)
    number_W = np.arange(whole_D.sum()) - np.repeat(np.cumsum(whole_D) - whole_D, whole_D)
    whole_W = np.repeat(start_D, whole_D) + number_W * row_length
    kept = np.flatnonzero(rest_D)
    kept = kept[np.argsort(_scattered(len(kept), salt), kind="stable")]
    kept = kept[np.argsort(-rest_D[kept], kind="stable")]
    size_P = rest_D[kept]
    bin_P, num_bins = best_fit(size_P, row_length)
    order_P = np.argsort(bin_P, kind="stable")
    starts = np.concatenate([whole_W, (start_D + whole_D * row_length)[kept][order_P]])
    lengths = np.concatenate([np.full(len(whole_W), row_length), size_P[order_P]]).astype(np.int32)
    counts = np.concatenate([np.ones(len(whole_W), dtype=np.int64), np.bincount(bin_P, minlength=num_bins)])
    return starts, lengths, counts


def best_fit(size_P: npt.NDArray[np.int64], capacity: int) -> tuple[npt.NDArray[np.int64], int]:
    """The bin of each piece, and the number of bins. Sizes descend, from `capacity` at most to 1 at least."""
    bins, bin_P, at = _Bins(capacity), np.empty(len(size_P), dtype=np.int64), 0
    sizes, counts = np.unique(size_P, return_counts=True)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = at + count
        while at < end:
            room, bins_N = bins.take(size, end - at)
            # Having taken one, a bin is still the fullest that takes another, as long as it does.
            times = room // size
            taken = min(len(bins_N) * times, end - at)
            bin_P[at : at + taken] = np.repeat(bins_N, times)[:taken]
            full, over = divmod(taken, times)
            bins.put(room - times * size, bins_N[:full])
            if over:
                bins.put(room - over * size, bins_N[full:])
            at += taken
    return bin_P, bins.number


class _Bins:
    """Bins by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self.number = 0
        self._capacity = capacity
        self._rooms: list[int] = []  # ascending
        self._by_room: dict[int, list[npt.NDArray[np.int64]]] = {}

    def take(self, size: int, count: int) -> tuple[int, npt.NDArray[np.int64]]:
        """The least room for `size`, and bins that have it: as many as `count` pieces need, or what there is."""
        at = bisect_left(self._rooms, size)
        if at == len(self._rooms):
            needed = -(-count // (self._capacity // size))
            self.number += needed
            return self._capacity, np.arange(self.number - needed, self.number)
        room = self._rooms[at]
        needed, stack, found = -(-count // (room // size)), self._by_room[room], []
        while needed and stack:
            top = stack.pop()
            if len(top) > needed:
                stack.append(top[needed:])
                top = top[:needed]
            found.append(top)
            needed -= len(top)
        if not stack:
            del self._by_room[room], self._rooms[at]
        return room, np.concatenate(found)

    def put(self, room: int, bins_N: npt.NDArray[np.int64]) -> None:
        if not room or not len(bins_N):
            return
        if room not in self._by_room:
            insort(self._rooms, room)
            self._by_room[room] = []
        self._by_room[room].append(bins_N)


def _scattered(count: int, salt: str) -> npt.NDArray[np.uint64]:
    """Hashes of 0 to count - 1 (splitmix64): an order that no version of a library changes."""
    with np.errstate(over="ignore"):
        mixed = np.arange(count, dtype=np.uint64) + np.uint64(xxhash.xxh64_intdigest(salt.encode()))
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
