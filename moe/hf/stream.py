"""Names and shapes, then tensors one by one -> a safetensors file; no more than one tensor is held.

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

_NAMES = {"float32": "F32", "bfloat16": "BF16"}


def write_tensors(
    path: Path,
    planned: "Mapping[str, tuple[tuple[int, ...], torch.dtype]]",
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


def _header(planned: "Mapping[str, tuple[tuple[int, ...], torch.dtype]]") -> bytes:
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
