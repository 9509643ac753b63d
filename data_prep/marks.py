"""A part of documents -> what tells copies and contamination: a hash, bands and a mark for each document.

`exact.npy` uint64 `[D, 2]`, `bands.npy` uint64 `[B, D]` (0: no words), `contaminated.npy` bool `[D]`; D documents,
B bands. Each only where the recipe asks for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from data_prep import parts, shingles
from data_prep.batches import Batches
from data_prep.records import Facts
from data_prep.texts import ReadAndClean
from data_prep.treatment import Duplicates, NearDuplicates
from moe.errors import DataError

EXACT, BANDS, CONTAMINATED = "exact.npy", "bands.npy", "contaminated.npy"


@dataclass(frozen=True)
class Mark:
    """The work of a unit: marks of its texts; `test_runs` holds sorted hashes of `test_words` words each.

    `texts` are the part at a path, or are read from their source, and then written nowhere.
    """

    texts: Path | ReadAndClean
    duplicates: Duplicates | None
    test_runs: Path | None
    test_words: int

    def __call__(self, folder: Path) -> Facts:
        facts: Facts = {}
        marks = _Marks(self)
        if isinstance(self.texts, Path):
            for batch in parts.texts(self.texts):
                marks.add(batch)
        else:
            batches = Batches(marks.add)
            facts = self.texts.read(folder, batches.add)
            batches.close()
        marks.save(folder)
        return {**facts, "documents": marks.documents}


@dataclass(frozen=True)
class TestRuns:
    """The work of a unit: the runs of `words` words of all test texts, `runs.npy` uint64 sorted."""

    files: tuple[Path, ...]
    fields: tuple[str, ...]
    words: int

    def __call__(self, folder: Path) -> Facts:
        known, hashes, short, count = shingles.WordHashes(), [], 0, 0
        for text in _test_texts(self.files, self.fields):
            words_W, bounds_T = shingles.hashed([shingles.split(text)], known)
            count += 1
            short += len(words_W) < self.words
            hashes.append(shingles.runs(words_W, bounds_T, self.words, short=False).hashes_R)
        found_R = np.unique(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)
        if not len(found_R):
            raise DataError(
                f"decontaminate.paths: {count} test texts, none with {self.words} words, so nothing can be found. "
                f"Check decontaminate.fields, or set a smaller decontaminate.words."
            )
        np.save(folder / "runs.npy", found_R)
        return {"texts": count, "too short": int(short), "runs": len(found_R)}


def bands(
    words_W: shingles.Hashes, bounds_T: npt.NDArray[np.int64], config: NearDuplicates
) -> shingles.Hashes:
    """Hash of each band of each text's MinHash `[B, T]`; 0 for a text without words."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise DataError(
            "duplicates.near needs rensa, which is not installed: pip install 'turnout[data]', or leave it out."
        ) from None
    runs = shingles.runs(words_W, bounds_T, config.shingle_words, short=True)
    signatures = RMinHash.digest_matrix_from_flat_token_hashes(
        runs.hashes_R, runs.bounds_T.astype(np.uint64), num_perm=config.bands * config.rows, seed=config.seed
    )
    rows_TP = np.array(signatures.to_rows(), dtype=np.uint32).reshape(
        len(bounds_T) - 1, config.bands, config.rows
    )
    total_TB = np.zeros(rows_TP.shape[:2], dtype=np.uint64)
    for row in range(config.rows):
        total_TB = (total_TB ^ rows_TP[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
        total_TB ^= total_TB >> np.uint64(29)
    total_TB |= np.uint64(1)
    total_TB[np.diff(runs.bounds_T) == 0] = 0
    return np.ascontiguousarray(total_TB.T)


class _Marks:
    """Those of a unit, as they are found."""

    def __init__(self, asked: Mark) -> None:
        self._asked = asked
        self._tests_R = np.load(asked.test_runs) if asked.test_runs else None
        self._found: dict[str, list[Any]] = {EXACT: [], BANDS: [], CONTAMINATED: []}
        self._known = shingles.WordHashes()
        self.documents = 0

    def add(self, batch: Sequence[bytes]) -> None:
        """The next documents."""
        if not batch:
            return
        self.documents += len(batch)
        duplicates = self._asked.duplicates
        if duplicates and duplicates.exact:
            self._found[EXACT].append(_digests(batch))
        near = duplicates.near if duplicates else None
        if near is None and self._tests_R is None:
            return
        split = (shingles.split(text.decode()) for text in batch)
        words_W, bounds_T = shingles.hashed(split, self._known)
        if near is not None:
            self._found[BANDS].append(bands(words_W, bounds_T, near))
        if self._tests_R is not None:
            hits_T = _hits(words_W, bounds_T, self._asked.test_words, self._tests_R)
            self._found[CONTAMINATED].append(hits_T)

    def save(self, folder: Path) -> None:
        for name, rows in self._found.items():
            if rows:
                np.save(folder / name, np.concatenate(rows, axis=1 if name == BANDS else 0))


def _digests(batch: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    digests = b"".join(xxhash.xxh3_128_digest(text) for text in batch)
    return np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)


def _hits(
    words_W: shingles.Hashes, bounds_T: npt.NDArray[np.int64], length: int, tests_R: shingles.Hashes
) -> npt.NDArray[np.bool_]:
    runs = shingles.runs(words_W, bounds_T, length, short=False)
    at_R = np.minimum(np.searchsorted(tests_R, runs.hashes_R), len(tests_R) - 1)
    hits_R = np.concatenate([[0], np.cumsum(tests_R[at_R] == runs.hashes_R)])
    return np.diff(hits_R[runs.bounds_T]) > 0


def _test_texts(files: Sequence[Path], fields: Sequence[str]) -> Iterator[str]:
    from data_prep.files import objects, whole

    for path in files:
        if ".jsonl" in path.suffixes:
            for row in objects(path):
                yield from _strings(row, fields)
        else:
            yield whole(path)


def _strings(row: Any, fields: Sequence[str]) -> Iterator[str]:
    for name in fields:
        value = row.get(name) if isinstance(row, dict) else None
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                yield text
