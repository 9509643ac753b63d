"""Matrices end to end in a flat buffer -> which a partition holds whole, and which its edges cut; integers only."""

from collections.abc import Iterable
from dataclasses import dataclass

from moe.optim.matrices import Stack


@dataclass(frozen=True)
class Run:
    """Whole matrices, one after the other."""

    here: slice
    """Where in the partition."""
    stack: Stack


@dataclass(frozen=True)
class Cut:
    """A matrix that lies in several partitions."""

    here: slice
    """Where in this partition its piece is."""
    rows: int
    columns: int
    pieces: dict[int, slice]
    """Partition -> which elements of the flattened matrix it holds."""


@dataclass(frozen=True)
class Share:
    """What one partition holds of a buffer's matrices, in the order of the buffer."""

    runs: list[Run]
    cuts: list[Cut]


def share(placed: Iterable[tuple[int, Stack]], size: int, index: int) -> Share:
    """The share of partition `index` when all have `size` elements; `placed`: where in the buffer each stack begins."""
    runs, cuts = [], []
    low, high = index * size, (index + 1) * size
    for start, stack in sorted(placed, key=lambda item: item[0]):
        begins = [start + matrix * stack.size for matrix in range(stack.count)]
        touching = [begin for begin in begins if begin < high and begin + stack.size > low]
        inside = [begin for begin in touching if low <= begin and begin + stack.size <= high]
        if inside:
            here = slice(inside[0] - low, inside[-1] + stack.size - low)
            runs.append(Run(here, Stack(len(inside), stack.rows, stack.columns)))
        cuts += [_cut(begin, stack, size, index) for begin in touching if begin not in inside]
    return Share(runs, cuts)


def _cut(begin: int, stack: Stack, size: int, index: int) -> Cut:
    """The matrix of `stack` that begins at `begin`, as partition `index` sees it."""
    pieces = {
        partition: slice(max(0, partition * size - begin), min(stack.size, (partition + 1) * size - begin))
        for partition in range(begin // size, (begin + stack.size - 1) // size + 1)
    }
    mine = pieces[index]
    offset = begin - index * size
    return Cut(slice(mine.start + offset, mine.stop + offset), stack.rows, stack.columns, pieces)
