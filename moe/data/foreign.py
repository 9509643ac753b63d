"""Token shards of other writers -> tokens of documents, end to end, as `TokenData` gives its own.

Megatron: `NAME.bin` and `NAME.idx` (see `moe.data.indexed`), where a document may be several sequences. datatrove:
`NAME.ds`, little-endian ids of 2 or 4 bytes, and `NAME.ds.index`, the uint64 end of each document in tokens. Files are
taken in the order of their names. Neither has hashes, nor says which tokenizer made it: ids must be below the
vocabulary they are read with. All is training text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from moe.data.indexed import Index, Tokens, open_tokens
from moe.data.tape import Tape
from moe.errors import DataError


@dataclass(frozen=True)
class ForeignTokens:
    """A folder of shards that `turnout prepare` did not make."""

    folder: Path
    kind: Literal["megatron", "datatrove"]
    vocab_size: int
    pad_id: int
    """Both of the tokenizer that made them, says the recipe."""

    @classmethod
    def open(
        cls, folder: Path, kind: Literal["megatron", "datatrove"], vocab_size: int, pad_id: int
    ) -> "ForeignTokens":
        """Raises `DataError` for a folder without shards, and for shards whose parts do not fit each other."""
        if not folder.is_dir():
            raise DataError(f"{folder}: there is no such folder. Mend the path.")
        found = cls(folder, kind, vocab_size, pad_id)
        if not found._shards:
            wanted = "NAME.idx with NAME.bin" if kind == "megatron" else "NAME.ds with NAME.ds.index"
            raise DataError(
                f"{folder}: there are no {kind} shards here ({wanted}). Mend the path or the format."
            )
        return found

    @property
    def is_chat(self) -> bool:
        """Never: who wrote what isn't known."""
        return False

    @cached_property
    def fingerprint(self) -> str:
        """Of the bounds of documents, and of the first and last tokens of each shard; not of all tokens."""
        digest = xxhash.xxh3_128()
        for name, ids_N, length_D in self._shards:
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(length_D).data)
            digest.update(np.ascontiguousarray(ids_N[:65536]).data)
            digest.update(np.ascontiguousarray(ids_N[-65536:]).data)
        return digest.hexdigest()

    def num_tokens(self, split: str) -> int:
        return len(self._tape) if split == "train" else 0

    def document_lengths(self, split: str) -> npt.NDArray[np.int64]:
        """Tokens of each document, in order."""
        none = np.zeros(0, dtype=np.int64)
        return np.concatenate([none, *(length_D for _, _, length_D in self._shards if split == "train")])

    def tokens(self, split: str, start: int, stop: int) -> Tokens:
        """As `TokenData.tokens`."""
        if not 0 <= start <= stop <= self.num_tokens(split):
            raise IndexError(
                f"tokens {start} to {stop} of {split}, which has {self.num_tokens(split)} tokens"
            )
        parts = self._tape.views(start, stop) if split == "train" else []
        if not parts:
            return np.empty(0, dtype=np.int32)
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if len(found) and (found.max() >= self.vocab_size or found.min() < 0):
            raise DataError(
                f"{self.folder}: an id of tokens {start} to {stop} is {int(found.max())}, but the tokenizer of "
                f"data.path has {self.vocab_size} tokens, from 0 on. These shards were made with another tokenizer: "
                f"leave this source out, or prepare its text again."
            )
        return found

    def pieces(self, split: str, starts: Sequence[int], lengths: Sequence[int]) -> Tokens:
        """As `TokenData.pieces`."""
        assert split == "train"
        ids_N = self._tape.pieces(starts, lengths)
        if ids_N.max() >= self.vocab_size or ids_N.min() < 0:
            for start, length in zip(starts, lengths, strict=True):
                self.tokens(split, start, start + length)  # says which it is
        return ids_N

    @cached_property
    def _tape(self) -> Tape:
        return Tape([ids_N for _, ids_N, _ in self._shards])

    @cached_property
    def _shards(self) -> list[tuple[str, Tokens, npt.NDArray[np.int64]]]:
        """Name, ids and lengths of documents."""
        pattern, read = ("*.idx", _megatron) if self.kind == "megatron" else ("*.ds", _datatrove)
        return [(path.name, *read(path)) for path in sorted(self.folder.glob(pattern))]

    def __reduce__(self) -> tuple[type["ForeignTokens"], tuple[Path, str, int, int]]:
        """Pickle the path, not the memory behind it."""
        return ForeignTokens, (self.folder, self.kind, self.vocab_size, self.pad_id)


def _megatron(path: Path) -> tuple[Tokens, npt.NDArray[np.int64]]:
    index = Index.read(path)
    index.check(path)
    ids_N = _ids(path.with_suffix(".bin"), index.dtype, index.num_bytes, path)
    sequence_S1 = np.concatenate([[0], np.cumsum(index.lengths_S, dtype=np.int64)])
    return ids_N, np.diff(sequence_S1[np.asarray(index.documents_D)])


def _datatrove(path: Path) -> tuple[Tokens, npt.NDArray[np.int64]]:
    index = path.with_name(f"{path.name}.index")
    try:
        raw, size = index.read_bytes(), path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{index}: the index of {path.name} cannot be read ({error.strerror}). Copy both files again."
        ) from None
    end_D = np.frombuffer(raw[: len(raw) // 8 * 8], dtype="<u8").astype(np.int64)
    total = int(end_D[-1]) if len(end_D) else 0
    widths = {2 * total: "uint16", 4 * total: "uint32"}
    if len(raw) % 8 or (np.diff(end_D, prepend=0) < 0).any() or size not in widths or (size and not total):
        raise DataError(
            f"{path}: {size} bytes, but {index.name} counts {total} tokens in {len(raw)} bytes of bounds: ids have 2 "
            f"or 4 bytes, and bounds 8 each. A file is cut or damaged: copy both again."
        )
    return _ids(path, widths[size], size, index), np.diff(end_D, prepend=0)


def _ids(path: Path, dtype: str, size: int, index: Path) -> Tokens:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path}: it belongs to {index.name}, but cannot be read ({error.strerror}). Copy both files again."
        ) from None
    if found != size:
        raise DataError(
            f"{path}: {found} bytes, but {index.name} describes {size}. The file is cut or was changed: copy both "
            f"files again."
        )
    return np.asarray(open_tokens(path, dtype))
