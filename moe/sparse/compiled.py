"""Desks at which what happens to rows between products is one pass of compiled code: rows.cpp.

M sources, n rows of one expert, D width, F expert width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe.sparse import kernels
from moe.sparse.activation import GatedUnit
from moe.sparse.desk import Desk
from moe.sparse.product import Products

_COPIES = {
    (torch.float32, torch.float32): "copy_float32",
    (torch.bfloat16, torch.bfloat16): "copy_bfloat16",
    (torch.bfloat16, torch.float32): "copy_bfloat16_to_float32",
}
"""By the dtypes of sources and products."""


def desk_for(like: Tensor, product_dtype: torch.dtype) -> type[Desk]:
    """The fastest kind there is here for sources `like` these."""
    known = like.device.type == "cpu" and (like.dtype, product_dtype) in _COPIES
    return CompiledDesk if known and kernels.library() is not None else Desk


class CompiledDesk(Desk):
    """Between two roundings all is in float32: a bf16 is rounded where it is stored, not after each operation.

    Its functions take addresses: `LoopedExperts` sees to it that all tensors are contiguous and of the dtypes they are
    said to be, and that every source is there.
    """

    backward_rooms = ("x", "out", "grad_hidden", "grad_gate_up")

    def __init__(
        self, like: Tensor, most_rows: int, width: int, products: Products, rooms: Sequence[str]
    ) -> None:
        super().__init__(like, most_rows, width, products, rooms)
        library = kernels.library()
        assert library is not None, "asked for by desk_for"
        name = str(self.dtype).removeprefix("torch.")
        self._copy = getattr(library, _COPIES[like.dtype, self.dtype])
        self._add = getattr(library, f"add_{name}")
        self._activate = getattr(library, f"activate_{name}")
        self._differentiate = getattr(library, f"differentiate_{name}")

    def copies(self, name: str, of_MD: Tensor, source: Tensor) -> Tensor:
        out = self.room(name)
        self._copy(of_MD.data_ptr(), source.data_ptr(), out.data_ptr(), self.rows, out.shape[1])
        return out

    def add(self, source: Tensor, rows: Tensor) -> None:
        sums = self.sums_MD
        self._add(rows.data_ptr(), source.data_ptr(), sums.data_ptr(), self.rows, sums.shape[1])

    def activate(self, unit: GatedUnit, gate_up: Tensor, weight: Tensor) -> Tensor:
        out = self.room("hidden")
        pointers = (gate_up.data_ptr(), weight.data_ptr(), out.data_ptr())
        self._activate(*_numbers(unit), *pointers, self.rows, self.width)
        return out

    def differentiate(
        self, unit: GatedUnit, gate_up: Tensor, weight: Tensor, grad: Tensor, grad_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad_gate_up = self.room("grad_gate_up")
        tensors = (gate_up, weight, grad, grad_gate_up, grad_weight)
        pointers = (tensor.data_ptr() for tensor in tensors)
        self._differentiate(*_numbers(unit), *pointers, self.rows, self.width)
        return grad, grad_gate_up


def _numbers(unit: GatedUnit) -> tuple[float, float, float]:
    return unit.alpha, unit.offset, math.inf if unit.limit is None else unit.limit
