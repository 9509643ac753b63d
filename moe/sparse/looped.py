"""All experts in one autograd node, expert by expert: the CPU's way.

M sources, R rows at their experts, n rows of one expert, D width, F expert width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe.sparse.activation import GatedUnit
from moe.sparse.copies import Copies


class LoopedExperts(torch.autograd.Function):
    """y_m = sum over the rows r of source m of w_r (down_e unit(gate_up_e x_m)), e the expert of row r.

    An expert's rows are copied, multiplied and summed back before the next one's, so that they never leave the
    cache and no [R, D] tensor is made; each expert's weight gradients are written in place. (Indexing a stacked
    parameter expert by expert would make autograd build a zero [e, ...] gradient for each.) Kept for backward
    per row: 2F pre-activations, or nothing with `recompute`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source_MD: Tensor,
        weights_R: Tensor,
        gate_up: Tensor,
        gate_up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        copies: Copies,
        unit: GatedUnit,
        recompute: bool,
    ) -> Tensor:
        scratch = _Scratch(source_MD, copies, down.shape[2])
        kept_R2F = source_MD.new_empty(0 if recompute else weights_R.numel(), gate_up.shape[1])
        weights_R = weights_R.to(source_MD.dtype)
        y_MD = torch.zeros_like(source_MD, dtype=_wide(source_MD))
        for e, rows, source in _blocks(copies):
            x = torch.index_select(source_MD, 0, source, out=scratch.rows("x", source))
            both = scratch.rows("gate_up", source) if recompute else kept_R2F[rows]
            _linear(x, gate_up[e], gate_up_bias, e, both)
            h = unit.activate(both, scratch.rows("hidden", source))
            h = unit.scale(h, both, h).mul_(weights_R[rows].unsqueeze(1))
            out = torch.mm(h, down[e].t(), out=scratch.rows("out", source))
            if down_bias is not None:
                out.addr_(weights_R[rows], down_bias[e])
            y_MD.index_add_(0, source, out.to(y_MD.dtype))
        ctx.save_for_backward(source_MD, weights_R, kept_R2F, gate_up, gate_up_bias, down, down_bias)
        ctx.copies, ctx.unit, ctx.recompute = copies, unit, recompute
        return y_MD.to(source_MD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        source_MD, weights_R, kept_R2F, gate_up, gate_up_bias, down, down_bias = ctx.saved_tensors
        unit: GatedUnit = ctx.unit
        scratch = _Scratch(source_MD, ctx.copies, down.shape[2])
        grad_MD = grad_MD.contiguous()
        grad_source_MD = torch.zeros_like(source_MD, dtype=_wide(source_MD))
        grad_weights_R = torch.empty_like(weights_R, dtype=grad_source_MD.dtype)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        grad_gate_up_bias = None if gate_up_bias is None else torch.zeros_like(gate_up_bias)
        grad_down_bias = None if down_bias is None else torch.zeros_like(down_bias)
        for e in (e for e, count in enumerate(ctx.copies.rows_per_bucket) if not count):
            grad_gate_up[e].zero_()
            grad_down[e].zero_()
        for e, rows, source in _blocks(ctx.copies):
            x = torch.index_select(source_MD, 0, source, out=scratch.rows("x", source))
            both = scratch.rows("gate_up", source) if ctx.recompute else kept_R2F[rows]
            if ctx.recompute:
                _linear(x, gate_up[e], gate_up_bias, e, both)
            grad_out = torch.index_select(grad_MD, 0, source, out=scratch.rows("out", source))
            activated = unit.activate(both, scratch.rows("activated", source))
            h = unit.scale(activated, both, scratch.rows("hidden", source))
            grad_h = torch.mm(grad_out, down[e], out=scratch.rows("grad_hidden", source))
            product = torch.mul(grad_h, h, out=scratch.rows("product", source))
            grad_weights_R[rows] = product.sum(1, dtype=grad_weights_R.dtype)
            weight = weights_R[rows].unsqueeze(1)
            torch.mm(grad_out.t(), h.mul_(weight), out=grad_down[e])
            if down_bias is not None and grad_down_bias is not None:
                grad_weights_R[rows] += torch.mv(grad_out, down_bias[e])
                torch.mv(grad_out.t(), weights_R[rows], out=grad_down_bias[e])
            grad_both = scratch.rows("grad_gate_up", source)
            unit.backward(both, activated, grad_h.mul_(weight), grad_both)
            torch.mm(grad_both.t(), x, out=grad_gate_up[e])
            if grad_gate_up_bias is not None:
                torch.sum(grad_both, 0, out=grad_gate_up_bias[e])
            grad_x = torch.mm(grad_both, gate_up[e], out=grad_out)
            grad_source_MD.index_add_(0, source, grad_x.to(grad_source_MD.dtype))
        grads = (grad_gate_up, grad_gate_up_bias, grad_down, grad_down_bias)
        return grad_source_MD.to(source_MD.dtype), grad_weights_R, *grads, None, None, None


class _Scratch:
    """Room for the rows of one expert at a time, by name; their content is whatever was there."""

    def __init__(self, like: Tensor, copies: Copies, width: int) -> None:
        self.like, self.most = like, max(copies.rows_per_bucket, default=0)
        model = like.shape[1]
        self.widths = {"x": model, "out": model, "gate_up": 2 * width, "grad_gate_up": 2 * width}
        self.width, self.buffers = width, dict[str, Tensor]()

    def rows(self, name: str, source: Tensor) -> Tensor:
        """As many rows as `source` has elements."""
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.most, self.widths.get(name, self.width))
        return self.buffers[name][: source.numel()]


def _blocks(copies: Copies) -> Iterator[tuple[int, slice, Tensor]]:
    """(expert, its rows, their sources) for every expert that has any."""
    start = 0
    for expert, count in enumerate(copies.rows_per_bucket):
        if count:
            rows = slice(start, start + count)
            yield expert, rows, copies.source_of_row_R[rows]
        start += count


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int, out: Tensor) -> None:
    torch.mm(x, weight.t(), out=out)
    if bias is not None:
        out.add_(bias[expert])


def _wide(tensor: Tensor) -> torch.dtype:
    """Sums over a source's rows are taken in at least float32, so that bf16 rounds once."""
    return torch.promote_types(tensor.dtype, torch.float32)
