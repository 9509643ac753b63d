"""Which tokens of a chat shard the assistant wrote: `NAME.mask` beside `NAME.bin`, a byte a token, 1 or 0."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from moe.data.manifest import FileStamp

Mask = npt.NDArray[np.uint8]


def mask_path(prefix: Path) -> Path:
    """Of the shard `prefix`."""
    return prefix.with_name(f"{prefix.name}.mask")


class MaskWriter:
    """Writes `PREFIX.mask` as documents come."""

    def __init__(self, prefix: Path) -> None:
        self._file = mask_path(prefix).open("wb")
        self._hash = xxhash.xxh3_128()
        self._num_bytes = 0

    def add(self, mask: Sequence[int]) -> None:
        """Append a document's."""
        block = np.asarray(mask, dtype=np.uint8).tobytes()
        self._file.write(block)
        self._hash.update(block)
        self._num_bytes += len(block)

    def close(self) -> FileStamp:
        """Finish the file; its stamp."""
        self._file.close()
        return FileStamp(bytes=self._num_bytes, xxh3_128=self._hash.hexdigest())

    def abandon(self) -> None:
        """Close the file; what was written is worthless."""
        self._file.close()


def open_mask(path: Path) -> Mask:
    """A read-only memmap `[tokens]`."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=np.uint8)
    mask: np.memmap[Any, np.dtype[np.uint8]] = np.memmap(path, dtype=np.uint8, mode="r")
    return mask
