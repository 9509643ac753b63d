"""Names and shapes, then tensors one by one -> safetensors files; no more than one tensor is held.

The format (https://huggingface.co/docs/safetensors): the length of the header in 8 bytes, little-endian; the
header, JSON, padded with spaces to a multiple of 8; the tensors' bytes end to end.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import ExportError

if TYPE_CHECKING:
    import torch

    Planned = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    """Keys, in order -> shapes and dtypes."""

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_NAMES = {"float32": "F32", "bfloat16": "BF16"}


def write_tensors(
    path: Path,
    planned: "Planned",
    tensors: Iterator[tuple[str, "torch.Tensor"]],
) -> None:
    """Write the next len(planned) of `tensors`: they must come by the names and in the shapes that are `planned`, and
    are converted to its dtypes.

    Raises `ExportError` if they do not; `OSError` as the system does.
    """
    import torch

    with path.open("wb") as file:
        file.write(_header(planned))
        for key, (shape, dtype) in planned.items():
            came, tensor = next(tensors, ("nothing", torch.empty(0)))
            if (came, tuple(tensor.shape)) != (key, shape):
                raise ExportError(
                    f"{path.name}: {came} {list(tensor.shape)} came where {key} {list(shape)} was planned: nothing "
                    f"was exported. Please report the recipe as a bug."
                )
            file.write(tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
            del tensor  # else it would be held while the next is read


def write_files(
    folder: Path,
    planned: "Planned",
    tensors: Iterator[tuple[str, "torch.Tensor"]],
    max_file_size: int,
    num_parameters: int,
) -> tuple[str, ...]:
    """Write all `tensors` into files filled in the order of `planned`, and an index if there are several.

    A tensor above the limit has a file of its own. Returns the files' names. Raises `ExportError`: a tensor that was
    not planned, or in another order.
    """
    sizes = {key: prod(shape) * dtype.itemsize for key, (shape, dtype) in planned.items()}
    files = _filled(sizes, max_file_size)
    for file, keys in files.items():
        write_tensors(folder / file, {key: planned[key] for key in keys}, tensors)
    if (left := next(tensors, None)) is not None:
        raise ExportError(f"{left[0]} was left over; nothing was exported.")
    if len(files) > 1:
        page = {
            "metadata": {"total_parameters": num_parameters, "total_size": sum(sizes.values())},
            "weight_map": {key: file for file, keys in files.items() for key in keys},
        }
        write_page(folder / INDEX, page)
    return tuple(files)


def write_page(path: Path, page: object) -> None:
    """A JSON file as `transformers` writes them."""
    path.write_text(json.dumps(page, indent=2) + "\n", encoding="utf-8")


def _filled(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File names -> keys."""
    groups: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": keys for n, keys in enumerate(groups, 1)}


def _header(planned: "Planned") -> bytes:
    page: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, (shape, dtype) in planned.items():
        end = start + prod(shape) * dtype.itemsize
        page[key] = {
            "dtype": _NAMES[str(dtype).removeprefix("torch.")],
            "shape": shape,
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(page, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
