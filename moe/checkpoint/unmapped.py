"""A safetensors file -> its tensors one at a time, by plain reads.

`safetensors` maps the whole file into memory: each page that was once looked at counts as ours while the file is
open. Here only the header is kept, and a tensor costs its own bytes. (https://huggingface.co/docs/safetensors)
"""

import json
import struct
from pathlib import Path

import torch
from torch import Tensor

from moe.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
}
"""What is read: checkpoints hold F32 and I64 alone."""
_LONGEST_HEADER = 10**8


class TensorFile:
    """One file; open only while a tensor is read. Raises `CheckpointError` if it is not what it should be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > _LONGEST_HEADER:
                    raise ValueError(f"a header of {length} bytes")
                self._entries = json.loads(file.read(length))
            self._entries.pop("__metadata__", None)
            self._data = 8 + length
            end = self._data + max((entry["data_offsets"][1] for entry in self._entries.values()), default=0)
            if path.stat().st_size != end:
                raise ValueError(f"{path.stat().st_size} bytes where {end} were written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise CheckpointError(
                f"{path} is no whole safetensors file ({error}). Fetch or write it again."
            ) from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Keys, in the order of the file's header, and their tensors' shapes."""
        return {key: tuple(entry["shape"]) for key, entry in self._entries.items()}

    def check(self, key: str) -> None:
        """Raise `CheckpointError` unless the tensor is of a type that can be read."""
        if (dtype := self._entries[key]["dtype"]) not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: {key} is of type {dtype}: weights are read as {', '.join(_DTYPES)}. Convert them first."
            )

    def read(self, key: str) -> Tensor:
        """A tensor in memory of its own. Raises `CheckpointError` if the file cannot be read any more."""
        entry = self._entries[key]
        return self._bytes(key, *entry["data_offsets"]).view(entry["shape"])

    def read_rows(self, key: str, first: int, end: int) -> Tensor:
        """Entries `first` to `end` of a tensor's first dimension, read alone; raises `CheckpointError` so too."""
        entry = self._entries[key]
        start, last = entry["data_offsets"]
        rows, *rest = entry["shape"]
        each = (last - start) // rows
        return self._bytes(key, start + first * each, start + end * each).view(end - first, *rest)

    def _bytes(self, key: str, start: int, end: int) -> Tensor:
        self.check(key)
        entry = self._entries[key]
        raw = torch.empty(end - start, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(self._data + start)
                if file.readinto(raw.numpy().data) != end - start:
                    raise OSError("it was cut")
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read ({error}). Mend that, and try again."
            ) from None
        return raw.view(_DTYPES[entry["dtype"]])
