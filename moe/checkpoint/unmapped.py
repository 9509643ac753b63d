"""A safetensors file -> its tensors one at a time, by plain reads.

`safetensors` maps the whole file into memory: each page that was once looked at counts as ours while the file is
open. Here only the header is kept, and a tensor costs its own bytes. (https://huggingface.co/docs/safetensors)
"""

import json
import struct
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from moe.errors import CheckpointError

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
"""What checkpoints hold: ours float32 and int64, other folders halves too."""


class TensorFile:
    """One file of a checkpoint; open only while a tensor is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            self._entries = json.loads(file.read(length))
        self._entries.pop("__metadata__", None)
        self._data = 8 + length

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by key."""
        return {key: tuple(entry["shape"]) for key, entry in self._entries.items()}

    def dtype(self, key: str) -> torch.dtype | None:
        """None: one that cannot be read here."""
        return _DTYPES.get(self._entries[key]["dtype"])

    def read(self, key: str) -> Tensor:
        """A tensor in memory of its own. Raises `CheckpointError` if the file cannot be read any more."""
        entry = self._entries[key]
        start, end = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        assert end - start == prod(entry["shape"]) * dtype.itemsize
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
        return raw.view(dtype).view(entry["shape"])
