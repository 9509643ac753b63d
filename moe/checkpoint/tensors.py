"""Tensors <-> a .safetensors file, each hashed by itself on the way."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe.checkpoint.folder import File, Manifest, Saved, way_out
from moe.errors import CheckpointError

_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def hash_of(tensor: Tensor) -> str:
    """XXH3-128 of a tensor's contiguous bytes in its own dtype, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(_bytes(tensor))


def write(path: Path, tensors: Mapping[str, Tensor]) -> tuple[File, dict[str, Saved]]:
    """Write and sync CPU tensors; returns what the file and each tensor must be.

    Our own writer, since safetensors' holds Python's lock while it writes: training would stand still. This one
    hashes and writes outside of it.
    """
    # Wide dtypes first, so that each begins at a multiple of its size.
    order = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, end = {}, 0
    for key, tensor in order:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    page = json.dumps(header, separators=(",", ":")).encode()
    page += b" " * (-len(page) % 8)
    whole, saved = xxhash.xxh3_128(), {}
    with path.open("wb") as file:
        for block in (len(page).to_bytes(8, "little"), page):
            whole.update(block)
            file.write(block)
        for key, tensor in order:
            content = _bytes(tensor)
            whole.update(content)
            file.write(content)
            saved[key] = Saved(path.name, tuple(tensor.shape), xxhash.xxh3_128_hexdigest(content))
        file.flush()
        os.fsync(file.fileno())
    return File(8 + len(page) + end, whole.hexdigest()), saved


class Reader:
    """Tensors of a checkpoint by key, each file opened once."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._files: dict[str, Any] = {}
        self._open = ExitStack()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._open.close()

    def get(self, key: str) -> Tensor:
        """Raises `CheckpointError` if there is no such tensor."""
        saved = self.manifest.tensors.get(key)
        if saved is None:
            raise CheckpointError(f"{self.folder} has no tensor {key}: it was written by another model.")
        try:
            if saved.file not in self._files:
                opened = safe_open(self.folder / saved.file, framework="pt")
                self._files[saved.file] = self._open.enter_context(opened)
            tensor: Tensor = self._files[saved.file].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / saved.file}: {key} cannot be read ({error}).") from None
        return tensor


def verify(folder: Path, manifest: Manifest, keys: Iterable[str] | None = None) -> int:
    """Hash the tensors (or those in `keys`) against the manifest; how many have a hash and are as written.

    Raises `CheckpointError` naming the first that is not.
    """
    count = 0
    with Reader(folder, manifest) as reader:
        for key in manifest.tensors if keys is None else keys:
            expected = manifest.tensors[key].xxh3
            if expected is None:
                continue
            if hash_of(reader.get(key)) != expected:
                raise CheckpointError(
                    f"{folder / manifest.tensors[key].file}: the tensor {key} does not have the hash it was written "
                    f"with: it was changed. {way_out(folder)}"
                )
            count += 1
    return count


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
