r"""Token ids of documents <-> a Megatron `.bin`/`.idx` pair.

`NAME.bin` holds the ids of all documents one after the other. `NAME.idx`, little-endian, holds

    9 bytes `MMIDIDX\0\0` | uint64 version 1 | uint8 dtype code | uint64 sequences S | uint64 D = documents + 1
    int32[S] sequence lengths in tokens | int64[S] sequence offsets in bytes | int64[D] first sequence of each
    document, and S at the end

Here a document is one sequence. Files of other writers may hold several sequences to a document.
"""

import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe.data.manifest import FileStamp, Stamper, TokenType
from moe.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES = {"uint16": 8, "int32": 4}

_HEADER = struct.Struct("<9sQBQQ")
_UINT16_BELOW = 65500  # Megatron's rule (DType.optimal_dtype), not 65536
_LONGEST = 2**31 - 1

Tokens = npt.NDArray[np.integer[Any]]


def token_dtype(vocab_size: int) -> TokenType:
    """Megatron's choice for a vocabulary of this size."""
    return "uint16" if vocab_size < _UINT16_BELOW else "int32"


class PairWriter:
    """Writes `PREFIX.bin` as documents come and `PREFIX.idx` on `close`."""

    def __init__(self, prefix: Path, dtype: str) -> None:
        self.prefix = prefix
        self.num_tokens = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._lengths = array("i")
        self._file = prefix.with_name(prefix.name + ".bin").open("wb")
        self._stamper = Stamper()

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def add(self, ids: Sequence[int]) -> None:
        """Append one document; raises `OverflowError` for an id that the dtype cannot hold."""
        ids_N = np.asarray(ids, dtype=self._dtype)
        if len(ids_N) > _LONGEST:
            raise DataError(
                f"a document has {len(ids_N)} tokens: an .idx file counts to {_LONGEST}. Split the document."
            )
        self._write(ids_N)
        self._lengths.append(len(ids_N))

    def add_many(self, ids_N: Tokens, lengths_D: npt.NDArray[np.int64]) -> None:
        """Append documents that lie end to end, `lengths_D` tokens each; ids must fit the dtype."""
        assert len(ids_N) == lengths_D.sum()
        self._write(ids_N.astype(self._dtype, copy=False))
        self._lengths.extend(lengths_D.tolist())  # an OverflowError beyond what an .idx file counts to

    def _write(self, ids_N: Tokens) -> None:
        block = ids_N.tobytes()
        self._file.write(block)
        self._stamper.update(block)
        self.num_tokens += len(ids_N)

    def close(self) -> tuple[FileStamp, FileStamp]:
        """Finish both files; their stamps, `.bin` first."""
        index = self._index()
        self._file.close()
        self.prefix.with_name(self.prefix.name + ".idx").write_bytes(index)
        of_index = Stamper()
        of_index.update(index)
        return self._stamper.close(), of_index.close()

    def abandon(self) -> None:
        """Close the file; what was written is worthless."""
        self._file.close()

    def _index(self) -> bytes:
        lengths_S = np.array(self._lengths, dtype="<i4")
        offsets_S = _offsets(lengths_S, self._dtype.itemsize)
        count = len(lengths_S)
        header = _HEADER.pack(MAGIC, VERSION, DTYPE_CODES[self._dtype.name], count, count + 1)
        documents_D = np.arange(count + 1, dtype="<i8")
        return header + lengths_S.tobytes() + offsets_S.tobytes() + documents_D.tobytes()


@dataclass(frozen=True)
class Index:
    """What an `.idx` file says: lengths int32 `[S]`, offsets int64 `[S]`, documents int64 `[D]`, as memmaps."""

    dtype: str
    lengths_S: npt.NDArray[np.int32]
    offsets_S: npt.NDArray[np.int64]
    documents_D: npt.NDArray[np.int64]

    @property
    def num_bytes(self) -> int:
        """Size of the `.bin` file that this index describes."""
        if not len(self.lengths_S):
            return 0
        return int(self.offsets_S[-1]) + int(self.lengths_S[-1]) * np.dtype(self.dtype).itemsize

    @classmethod
    def read(cls, path: Path) -> "Index":
        """Open `path`; raises `DataError` if it is no index or its size does not fit its own header."""
        try:
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise DataError(
                f"{path}: the index cannot be read ({error.strerror}). Prepare the data again."
            ) from None
        if len(header) < _HEADER.size or header[: len(MAGIC)] != MAGIC:
            raise DataError(
                f"{path}: this is not a Megatron index (it must begin with MMIDIDX). Prepare the data again."
            )
        _, version, code, sequences, documents = _HEADER.unpack(header)
        dtype = {code: name for name, code in DTYPE_CODES.items()}.get(code)
        if version != VERSION or dtype is None:
            raise DataError(
                f"{path}: index version {version} with dtype code {code}: only version {VERSION} with codes "
                f"{DTYPE_CODES} can be read. Prepare the data again."
            )
        expected = _HEADER.size + 12 * sequences + 8 * documents
        if size != expected or documents < 1:
            raise DataError(
                f"{path}: {size} bytes, but {sequences} sequences and {documents} document bounds need {expected}. "
                f"The file is cut or damaged: prepare the data again, or copy it again."
            )
        at = _HEADER.size
        return cls(
            dtype,
            _section(path, "<i4", at, sequences),
            _section(path, "<i8", at + 4 * sequences, sequences),
            _section(path, "<i8", at + 12 * sequences, documents),
        )

    def check(self, path: Path) -> None:
        """Raise `DataError` unless sequences lie end to end and documents cover them; `path` names the file."""
        lengths_S, documents_D = np.asarray(self.lengths_S), np.asarray(self.documents_D)
        itemsize = np.dtype(self.dtype).itemsize
        sound = (
            (lengths_S >= 0).all()
            and np.array_equal(self.offsets_S, _offsets(lengths_S, itemsize))
            and documents_D[0] == 0
            and documents_D[-1] == len(lengths_S)
            and (np.diff(documents_D) >= 0).all()
        )
        if not sound:
            raise DataError(
                f"{path}: its offsets do not follow from its lengths, or its document bounds do not cover them. "
                f"The file is damaged: prepare the data again, or copy it again."
            )


def open_tokens(path: Path, dtype: str) -> Tokens:
    """The ids of a `.bin` file, a read-only memmap `[tokens]`; an empty file gives an empty array."""
    little = np.dtype(dtype).newbyteorder("<")
    if path.stat().st_size == 0:
        return np.empty(0, dtype=little)
    return np.memmap(path, dtype=little, mode="r")


def _offsets(lengths_S: npt.NDArray[np.int32], itemsize: int) -> npt.NDArray[np.int64]:
    ends_S: npt.NDArray[np.int64] = np.cumsum(lengths_S, dtype=np.dtype("<i8"))
    offsets_S: npt.NDArray[np.int64] = (ends_S - lengths_S) * itemsize
    return offsets_S


def _section(path: Path, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
    if count == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
