"""Encoded documents of one split -> its shards."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe.data.shards import MaskWriter, PairWriter, ShardFacts, Split, SplitFacts


class SplitWriter:
    """Writes `SPLIT-00000.bin/.idx`, `SPLIT-00001...`; a new shard begins when one has `shard_tokens` tokens."""

    def __init__(self, folder: Path, split: Split, dtype: str, shard_tokens: int) -> None:
        self.split = split
        self._folder, self._dtype, self._limit = folder, dtype, shard_tokens
        self._shards: list[ShardFacts] = []
        self._pair: PairWriter | None = None
        self._mask: MaskWriter | None = None
        self._num_bytes = 0

    def add(self, ids: list[int], num_bytes: int, mask: list[int] | None = None) -> None:
        """Append a document; `num_bytes` is the length of its text that is predicted, all if there is no `mask`.

        `mask` has a 1 for each token that is; all documents come with one, or none.
        """
        pair = self._open(has_mask=mask is not None)
        pair.add(ids)
        assert (self._mask is None) == (mask is None)
        if self._mask is not None and mask is not None:
            assert len(mask) == len(ids)
            self._mask.add(mask)
        self._num_bytes += num_bytes
        if pair.num_tokens >= self._limit:
            self._finish(pair)

    def add_many(self, ids_N: npt.NDArray[Any], lengths_D: npt.NDArray[np.int64], num_bytes: int) -> None:
        """As `add` for each of the documents that lie end to end in `ids_N`; `num_bytes` is of all their texts."""
        ends_D = np.cumsum(lengths_D)
        document, token = 0, 0
        while document < len(lengths_D):
            pair = self._open(has_mask=False)
            room = self._limit - pair.num_tokens
            stop = min(int(np.searchsorted(ends_D, token + room)) + 1, len(lengths_D))
            end = int(ends_D[stop - 1])
            pair.add_many(ids_N[token:end], lengths_D[document:stop])
            document, token = stop, end
            if pair.num_tokens >= self._limit:
                self._finish(pair)
        self._num_bytes += num_bytes

    def _open(self, has_mask: bool) -> PairWriter:
        if self._pair is None:
            prefix = self._folder / f"{self.split}-{len(self._shards):05d}"
            self._pair = PairWriter(prefix, self._dtype)
            self._mask = MaskWriter(prefix) if has_mask else None
        return self._pair

    def close(self) -> SplitFacts | None:
        """What was written; null if nothing was."""
        if self._pair is not None:
            self._finish(self._pair)
        if not self._shards:
            return None
        return SplitFacts(
            documents=sum(shard.documents for shard in self._shards),
            tokens=sum(shard.tokens for shard in self._shards),
            bytes=self._num_bytes,
            shards=self._shards,
        )

    def abandon(self) -> None:
        """Let go of the open file."""
        if self._pair is not None:
            self._pair.abandon()
        if self._mask is not None:
            self._mask.abandon()

    def _finish(self, pair: PairWriter) -> None:
        bin_stamp, idx_stamp = pair.close()
        self._shards.append(
            ShardFacts(
                name=pair.prefix.name,
                documents=pair.num_documents,
                tokens=pair.num_tokens,
                bin=bin_stamp,
                idx=idx_stamp,
                mask=self._mask.close() if self._mask is not None else None,
            )
        )
        self._pair = self._mask = None
