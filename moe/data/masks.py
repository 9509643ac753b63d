"""Which tokens of a chat shard the assistant wrote: `NAME.mask` beside `NAME.bin`, a byte a token, 1 or 0."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe.data.manifest import FileStamp, Stamper

Mask = npt.NDArray[np.uint8]


def mask_path(prefix: Path) -> Path:
    """Of the shard `prefix`."""
    return prefix.with_name(f"{prefix.name}.mask")


class MaskWriter:
    """Writes `PREFIX.mask` as documents come."""

    def __init__(self, prefix: Path) -> None:
        self._file = mask_path(prefix).open("wb")
        self._stamper = Stamper()

    def add(self, mask: Sequence[int]) -> None:
        """Append a document's."""
        block = np.asarray(mask, dtype=np.uint8).tobytes()
        self._file.write(block)
        self._stamper.update(block)

    def close(self) -> FileStamp:
        """Finish the file; its stamp."""
        self._file.close()
        return self._stamper.close()

    def abandon(self) -> None:
        """Close the file; what was written is worthless."""
        self._file.close()


def open_mask(path: Path) -> Mask:
    """A read-only memmap `[tokens]`."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=np.uint8)
    mask: np.memmap[Any, np.dtype[np.uint8]] = np.memmap(path, dtype=np.uint8, mode="r")
    return mask
