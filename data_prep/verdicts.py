"""Marks of all parts -> for each document the reason why it is dropped, or that it is kept.

A verdict depends on the order of documents alone, never on how they were shared out: of copies the first stays.
Contaminated documents go first, so that no clean text is dropped for the sake of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.marks import BANDS, CONTAMINATED, EXACT
from data_prep.records import Facts

REASONS = ("", "contaminated", "exact duplicate", "near duplicate")
_CONTAMINATED, _EXACT, _NEAR = 1, 2, 3

Verdicts = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Judge:
    """The work of a unit: `PART.npy` uint8 `[D]` for each of the folders of marks; D documents of that part."""

    marks: tuple[Path, ...]
    documents: tuple[int, ...]
    names: tuple[str, ...]

    def __call__(self, folder: Path) -> Facts:
        bounds = np.concatenate([[0], np.cumsum(self.documents)])
        verdicts_D = np.zeros(int(bounds[-1]), dtype=np.uint8)
        if found := self._load(CONTAMINATED):
            verdicts_D[np.concatenate(found)] = _CONTAMINATED
        if found := self._load(EXACT):
            _mark(verdicts_D, _first_of_equal(np.concatenate(found), verdicts_D == 0), _EXACT)
        if found := self._load(BANDS):
            _mark(verdicts_D, _first_of_alike(found, verdicts_D == 0), _NEAR)
        for name, start, stop in zip(self.names, bounds[:-1], bounds[1:], strict=True):
            np.save(folder / f"{name}.npy", verdicts_D[start:stop])
        counts = np.bincount(verdicts_D, minlength=len(REASONS)).tolist()
        return dict(zip(REASONS[1:], counts[1:], strict=True))

    def _load(self, name: str) -> list[npt.NDArray[np.uint64]]:
        return [np.load(path / name, mmap_mode="r") for path in self.marks if (path / name).exists()]


def _mark(verdicts_D: Verdicts, first_D: npt.NDArray[np.int64], verdict: int) -> None:
    is_copy_D = (first_D != np.arange(len(first_D))) & (verdicts_D == 0)
    verdicts_D[is_copy_D] = verdict


def _first_of_equal(
    digests_D2: npt.NDArray[np.uint64], in_question_D: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """For each document in question the first one with its digest, itself if there is none before."""
    first_D = np.arange(len(digests_D2))
    asked_Q = np.flatnonzero(in_question_D)
    if len(asked_Q):
        digests_Q = (
            np.ascontiguousarray(digests_D2[asked_Q]).view([("a", np.uint64), ("b", np.uint64)]).ravel()
        )
        _, first_U, inverse_Q = np.unique(digests_Q, return_index=True, return_inverse=True)
        first_D[asked_Q] = asked_Q[first_U[inverse_Q.ravel()]]
    return first_D


def _first_of_alike(
    bands: Sequence[npt.NDArray[np.uint64]], in_question_D: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """For each document the first one of its cluster: those that any chain of equal bands ties together."""
    asked_Q = np.flatnonzero(in_question_D)
    least_Q = np.arange(len(asked_Q))
    # One band after the other, so that memory is some 60 bytes a document, however many bands there are.
    for band in range(bands[0].shape[0] if bands else 0):
        hashes_Q = np.concatenate([part[band] for part in bands])[asked_Q]
        order_Q = np.argsort(hashes_Q, kind="stable")
        sorted_Q = hashes_Q[order_Q]
        is_tied_Q = np.concatenate([[False], (sorted_Q[1:] == sorted_Q[:-1]) & (sorted_Q[1:] != 0)])
        at_Q = np.flatnonzero(is_tied_Q)
        ties_2T = np.stack([least_Q[order_Q[at_Q - 1]], least_Q[order_Q[at_Q]]])  # of clusters so far
        least_Q = _clusters(ties_2T[:, ties_2T[0] != ties_2T[1]], len(asked_Q))[least_Q]
    first_D = np.arange(len(in_question_D))
    first_D[asked_Q] = asked_Q[least_Q]
    return first_D


def _clusters(ties_2T: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """The least member of each one's cluster, by ties `[2, T]` between them."""
    least_Q = np.arange(count)
    one_T, other_T = ties_2T
    while True:
        least_T = np.minimum(least_Q[one_T], least_Q[other_T])
        now_Q = least_Q.copy()
        np.minimum.at(now_Q, one_T, least_T)
        np.minimum.at(now_Q, other_T, least_T)
        np.minimum.at(now_Q, least_Q[one_T], least_T)
        np.minimum.at(now_Q, least_Q[other_T], least_T)
        now_Q = now_Q[now_Q]
        if np.array_equal(now_Q, least_Q):
            return least_Q
        least_Q = now_Q
