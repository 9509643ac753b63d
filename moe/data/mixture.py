"""Weights of sources, by stages -> the source of every sample, as a function of its number alone; no files, no state.

Sample n of a stage belongs to the source in whose part of [0, 1) the point frac(n phi) lies, phi the golden ratio: of
all such sequences the most even, so that a source's share among the first n samples is off by a few samples whatever
n is. How many of them a source has had is counted at once, not one by one (a sum of floors, by Euclid's algorithm), so
that a run goes on at any step.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

_WHOLE = 1 << 61
_STRIDE = 1425089352415399811
"""2^61 over the golden ratio, rounded to an odd number."""


@dataclass(frozen=True)
class Stage:
    """From sample `first` on, until the next stage."""

    first: int
    weights: tuple[float, ...]
    """Of each source; any scale."""


class Mixture:
    """What an endless row of samples is made of."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        """Stages ascend, the first from sample 0 on; in each some weight is above 0."""
        self._firsts = [stage.first for stage in stages]
        self._bounds = [_bounds(stage.weights) for stage in stages]
        sources = len(stages[0].weights)
        self._before = [[0] * sources]
        """Samples of each source before each stage."""
        for bounds, (first, last) in zip(self._bounds, pairwise(self._firsts), strict=False):
            here = _counts(bounds, last - first)
            self._before.append([a + b for a, b in zip(self._before[-1], here, strict=True)])

    def counts(self, number: int) -> list[int]:
        """How many of the first `number` samples belong to each source."""
        stage = bisect_right(self._firsts, number) - 1
        here = _counts(self._bounds[stage], number - self._firsts[stage])
        return [before + count for before, count in zip(self._before[stage], here, strict=True)]

    def stretch(self, first: int, count: int) -> list[tuple[int, int]]:
        """Of samples `first` to `first + count - 1`: the source, and how many of its samples came before."""
        counts, found = self.counts(first), []
        for number in range(first, first + count):
            stage = bisect_right(self._firsts, number) - 1
            point = (number - self._firsts[stage]) * _STRIDE % _WHOLE
            source = bisect_right(self._bounds[stage], point)
            found.append((source, counts[source]))
            counts[source] += 1
        return found


def _bounds(weights: Sequence[float]) -> list[int]:
    """Where each source's part ends, in 2^61ths; the last at the whole."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    return [int(_WHOLE * reached / total) for reached in accumulate(exact)]


def _counts(bounds: Sequence[int], number: int) -> list[int]:
    """How many of the points 0 to `number` - 1 lie in each part."""
    below = [0, *(_below(bound, number) for bound in bounds)]
    return [last - first for first, last in pairwise(below)]


def _below(bound: int, number: int) -> int:
    """How many n < `number` have n stride mod whole < bound: the sum of floor(x) - floor(x - bound / whole)."""
    if bound == _WHOLE:
        return number
    shifted = _floors(number, _WHOLE, _STRIDE, _WHOLE - bound) - number
    return _floors(number, _WHOLE, _STRIDE, 0) - shifted


def _floors(count: int, divisor: int, slope: int, offset: int) -> int:
    """The sum over n < count of floor((slope n + offset) / divisor)."""
    total = 0
    while count:
        total += count * (count - 1) // 2 * (slope // divisor) + count * (offset // divisor)
        slope, offset = slope % divisor, offset % divisor
        reached = slope * count + offset
        if reached < divisor:
            break
        count, offset, divisor, slope = reached // divisor, reached % divisor, slope, divisor
    return total
