r"""Packed rows <-> an index file beside the shards, so that the ranks of a machine pack once and share the memory.

`FOLDER/.packing/SPLIT-LENGTH-KEY.pieces`, little-endian, holds

    8 bytes `TURNPACK` | 16 bytes xxh3_128 of all that follows | uint64 pieces P | uint64 rows R
    int64[P] starts | int64[R + 1] first pieces | int32[P] lengths

The key is a hash of all that the rows follow from: tokens, split, length, seed. A file that is missing, damaged or of
other settings is packed anew, so nothing depends on it; where it cannot be written, it is done without.
"""

import json
import os
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from moe.data.packing import Pieces, pack

_MAGIC, _VERSION = b"TURNPACK", 1
_HEADER, _SIZES = struct.Struct("<8s16s"), struct.Struct("<QQ")


def open_pieces(
    folder: Path, fingerprint: str, split: str, end_D: npt.NDArray[np.int64], length: int, seed: int
) -> Pieces:
    """The rows of documents that end at `end_D`, from the index file if it is there; `fingerprint`: of the tokens."""
    key = json.dumps([_VERSION, fingerprint, split, int(end_D[-1]) if len(end_D) else 0, length, seed])
    path = folder / ".packing" / f"{split}-{length}-{xxhash.xxh3_64_hexdigest(key.encode())}.pieces"
    if (found := _read(path)) is not None:
        return found
    pieces = pack(np.diff(end_D, prepend=0), length, seed)
    _write(path, pieces)
    return pieces


def _read(path: Path) -> Pieces | None:
    """None if it is not there or not whole."""
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError):  # ValueError: it is empty
        return None
    at = _HEADER.size + _SIZES.size
    if len(raw) < at:
        return None
    magic, digest = _HEADER.unpack_from(raw.data)
    if magic != _MAGIC or xxhash.xxh3_128_digest(raw.data[_HEADER.size :]) != digest:
        return None
    pieces, rows = _SIZES.unpack_from(raw.data, _HEADER.size)
    plain = np.asarray(raw)
    start_P = plain[at : at + 8 * pieces].view("<i8")
    row_R1 = plain[at + 8 * pieces : at + 8 * (pieces + rows + 1)].view("<i8")
    return Pieces(start_P, plain[at + 8 * (pieces + rows + 1) :].view("<i4"), row_R1)


def _write(path: Path, pieces: Pieces) -> None:
    body = [
        _SIZES.pack(len(pieces.start_P), pieces.num_rows),
        pieces.start_P.astype("<i8").tobytes(),
        pieces.row_R1.astype("<i8").tobytes(),
        pieces.length_P.astype("<i4").tobytes(),
    ]
    digest = xxhash.xxh3_128()
    for part in body:
        digest.update(part)
    mine = path.with_name(f".{path.name}.{os.getpid()}")  # other ranks may be writing the same
    try:
        path.parent.mkdir(exist_ok=True)
        try:
            with mine.open("wb") as file:
                file.writelines([_HEADER.pack(_MAGIC, digest.digest()), *body])
            mine.replace(path)
        finally:
            mine.unlink(missing_ok=True)
    except OSError:
        return  # a read-only folder, or a full disk
