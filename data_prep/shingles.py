"""Texts -> hashes of their runs of words, by which likeness and contamination are told.

Words are lower-case runs of letters and digits; a character of a script without spaces (Chinese, Japanese, Thai,
Korean) is a word. T texts end to end have W words; texts of fewer than `length` words are one run themselves.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

Hashes = npt.NDArray[np.uint64]

_UNSPACED = (
    "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_REMEMBERED = 250_000
"""Words, some 150 bytes each; those of a text that are met often are soon known again."""


@dataclass(frozen=True)
class Runs:
    """`hashes_R` of the runs of all texts end to end; those of text t are between `bounds_T[t]` and `[t + 1]`."""

    hashes_R: Hashes
    bounds_T: npt.NDArray[np.int64]


class WordHashes(dict[str, int]):
    """A word to its hash, remembered."""

    def __missing__(self, word: str) -> int:
        if len(self) > _REMEMBERED:
            self.clear()
        self[word] = found = xxhash.xxh3_64_intdigest(word.encode())
        return found


def split(text: str) -> list[str]:
    """Its words."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def hashed(texts: Iterable[Sequence[str]], known: WordHashes) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Word hashes `[W]` of texts given as words, and bounds `[T + 1]`."""
    lists = list(texts)
    bounds_T = np.concatenate([[0], np.cumsum([len(words) for words in lists], dtype=np.int64)])
    words = (known[word] for words in lists for word in words)
    return np.fromiter(words, np.uint64, int(bounds_T[-1])), bounds_T.astype(np.int64)


def runs(words_W: Hashes, bounds_T: npt.NDArray[np.int64], length: int, *, short: bool) -> Runs:
    """Runs of `length` words inside each text; with `short`, a text of fewer words, but some, is a run itself."""
    counts_T = np.diff(bounds_T)
    rolled_W = _rolled(words_W, length)
    num_runs_T = np.maximum(counts_T - length + 1, 0)
    starts_R = _positions(bounds_T[:-1], num_runs_T)
    if not short:
        return Runs(rolled_W[starts_R], _bounds(num_runs_T))
    is_short_T = (counts_T > 0) & (counts_T < length)
    hashes_R = np.empty(int((num_runs_T + is_short_T).sum()), dtype=np.uint64)
    bounds_R = _bounds(num_runs_T + is_short_T)
    is_whole_R = np.zeros(len(hashes_R), dtype=bool)
    is_whole_R[bounds_R[:-1][is_short_T]] = True
    hashes_R[~is_whole_R] = rolled_W[starts_R]
    hashes_R[is_whole_R] = [
        xxhash.xxh3_64_intdigest(words_W[bounds_T[at] : bounds_T[at + 1]].tobytes())
        for at in np.flatnonzero(is_short_T)
    ]
    return Runs(hashes_R, bounds_R)


def _rolled(words_W: Hashes, length: int) -> Hashes:
    """Hash of the run that begins at each word; of the last ones, that are too short, nothing to rely on."""
    total_W = np.zeros_like(words_W)
    padded_W = np.concatenate([words_W, np.zeros(length, dtype=np.uint64)])
    for offset in range(length):
        total_W = (total_W ^ padded_W[offset : offset + len(words_W)]) * _FACTOR
        total_W ^= total_W >> np.uint64(29)
    return total_W


def _positions(starts_T: npt.NDArray[np.int64], counts_T: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """start, start + 1, ... of each, `counts_T` of them."""
    before_T = np.cumsum(counts_T) - counts_T
    return np.repeat(starts_T - before_T, counts_T) + np.arange(int(counts_T.sum()))


def _bounds(counts_T: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts_T)]).astype(np.int64)
