"""Memory of a big tensor that nobody holds any more -> the next one of its name."""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST_BYTES = 32 << 20
"""What is smaller glibc keeps itself, whatever it has learnt (M_MMAP_THRESHOLD, mallopt(3))."""


class Spare:
    """One piece of memory for each name, kept from step to step and from layer to layer.

    C libraries return big blocks to the system, which hands them out again page by page, each zeroed and with a trap:
    a tenth of a backward, for experts that hold a gigabyte. On CUDA torch keeps what is freed itself.

    So much memory stays taken between two steps, until the model goes. A copy of a model has a spare of its own, and so
    has one that was pickled.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def empty(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """As `like.new_empty(shape)`, but that it cannot be resized.

        When its memory is released it is kept, if none of its name is. What is kept serves what is smaller by a fifth
        at most, and gives way to anything else.
        """
        size = math.prod(shape) * like.element_size()
        if like.device.type != "cpu" or size < LEAST_BYTES:
            return like.new_empty(shape)
        memory = self._memory.pop(name, None)
        if memory is None or not size <= memory.numel() <= size + size // 4:
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        # Torch holds what it is given for as long as any tensor uses it.
        lease = memory.numpy().view(_Lease)
        weakref.finalize(lease, self._memory.setdefault, name, memory).atexit = False
        storage = torch.from_numpy(lease).untyped_storage()
        empty: Tensor = like.new_empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]  # of bytes
        return empty

    def __deepcopy__(self, memo: dict[int, Any]) -> "Spare":
        return Spare()

    def __reduce__(self) -> tuple[type["Spare"], tuple[()]]:
        return Spare, ()


class _Lease(np.ndarray[Any, Any]):
    """An array that can be watched until it goes."""
