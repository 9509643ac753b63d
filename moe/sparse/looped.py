"""All experts in one autograd node, expert by expert: the CPU's way.

M sources, R rows at their experts, P with those that fill up, n rows of one expert, D width, F expert width.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.sparse.activation import GatedUnit
from moe.sparse.copies import Copies
from moe.sparse.desk import Desk, Job, at_desks
from moe.sparse.once import first_derivative_only
from moe.sparse.padded import Padded
from moe.sparse.product import Products
from moe.sparse.spare import Spare


class LoopedExperts(torch.autograd.Function):
    """y_m = sum over the rows r of source m of w_r (down_e unit(gate_up_e x_m)), e the expert of row r.

    An expert's rows are copied, multiplied and summed back before the next one's, so that they never leave the
    cache and no [R, D] tensor is made; each expert's weight gradients are written in place. (Indexing a stacked
    parameter expert by expert would make autograd build a zero [e, ...] gradient for each.) Kept for backward
    per row: 2F pre-activations, or nothing with `recompute`. Between what is read and what is stored, everything
    is in the dtype of `products`. `kind` is whose desk the work is done at; `spare` gives memory for what is kept and
    for gradients.

    Raises `IndexError` for a row of a source that is not there, `ValueError` for tensors that do not belong together.
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
        products: Products,
        kind: type[Desk],
        spare: Spare,
    ) -> Tensor:
        source_MD = source_MD.contiguous()
        padded = Padded.of(copies, products)
        wide = torch.promote_types(products.dtype, torch.float32)
        weights_P = padded.spread(weights_R.to(wide)).contiguous()
        _check(source_MD, weights_P, padded, gate_up, down)
        shape = (weights_P.numel(), gate_up.shape[1])
        kept_P2F = None if recompute else spare.empty("kept", shape, source_MD)

        def work(desk: Desk, e: int, rows: _Rows) -> None:
            x = desk.copies("x", source_MD, rows.source)
            kept = rows.gate_up
            room = desk.room("gate_up") if kept is None or kept.dtype != desk.dtype else kept
            both = _linear(desk, x, gate_up[e], gate_up_bias, e, room)
            if kept is not None and kept is not both:
                kept.copy_(both)
            h = desk.activate(unit, both, rows.weight)
            out = desk.multiply(h, desk.weight(down[e]).t(), desk.room("out"))
            if down_bias is not None:
                out.addr_(rows.weight.to(out.dtype), down_bias[e].to(out.dtype))
            desk.add(rows.source, out)

        make = partial(kind, source_MD, width=down.shape[2], products=products, rooms=kind.forward_rooms)
        jobs = _jobs(padded, weights_P, kept_P2F)
        y_MD = at_desks(work, jobs, source_MD, make)
        ctx.save_for_backward(source_MD, weights_P, kept_P2F, gate_up, gate_up_bias, down, down_bias)
        ctx.padded, ctx.unit, ctx.products = padded, unit, products
        ctx.kind, ctx.spare = kind, spare
        return y_MD

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        source_MD, weights_P, kept_P2F, gate_up, gate_up_bias, down, down_bias = ctx.saved_tensors
        # Hooks on saved tensors may have laid them out anew.
        source_MD, weights_P = source_MD.contiguous(), weights_P.contiguous()
        kept_P2F = None if kept_P2F is None else kept_P2F.contiguous()
        padded: Padded = ctx.padded
        unit: GatedUnit = ctx.unit
        grad_MD = grad_MD.contiguous()
        grad_weights_P = torch.empty_like(weights_P)
        spare: Spare = ctx.spare
        needs_gate_up, needs_gate_up_bias, needs_down, needs_down_bias = ctx.needs_input_grad[2:6]
        grad_gate_up = spare.empty("gate_up", gate_up.shape, gate_up) if needs_gate_up else None
        grad_down = spare.empty("down", down.shape, down) if needs_down else None
        grad_gate_up_bias = torch.zeros_like(gate_up_bias) if needs_gate_up_bias else None
        grad_down_bias = torch.zeros_like(down_bias) if needs_down_bias else None
        for e in (e for e, count in enumerate(padded.rows_per_bucket) if not count):
            for grad in (grad_gate_up, grad_down):
                if grad is not None:
                    grad[e].zero_()

        def work(desk: Desk, e: int, rows: _Rows) -> None:
            if needs_gate_up or rows.gate_up is None:
                x = desk.copies("x", source_MD, rows.source)
            if rows.gate_up is None:
                both = _linear(desk, x, gate_up[e], gate_up_bias, e, desk.room("gate_up"))
                if both.dtype != source_MD.dtype:
                    both.copy_(both.to(source_MD.dtype))  # as they would have been kept
            else:
                both = desk.rows_of("gate_up", rows.gate_up)
            grad_out = desk.copies("out", grad_MD, rows.source)
            grad_h = desk.multiply(grad_out, desk.weight(down[e]), desk.room("grad_hidden"))
            h, grad_both = desk.differentiate(unit, both, rows.weight, grad_h, rows.grad_weight)
            if grad_down is not None:
                desk.write(grad_out.t(), h, out=grad_down[e])
            if down_bias is not None:
                rows.grad_weight.add_(torch.mv(grad_out, down_bias[e].to(grad_out.dtype)))
            if grad_down_bias is not None:
                grad_down_bias[e] = torch.mv(grad_out.t(), rows.weight.to(grad_out.dtype))
            if grad_gate_up is not None:
                desk.write(grad_both.t(), x, out=grad_gate_up[e])
            if grad_gate_up_bias is not None:
                grad_gate_up_bias[e] = grad_both.sum(0)
            desk.add(rows.source, desk.multiply(grad_both, desk.weight(gate_up[e]), grad_out))

        kind: type[Desk] = ctx.kind
        make = partial(kind, source_MD, width=down.shape[2], products=ctx.products, rooms=kind.backward_rooms)
        jobs = _jobs(padded, weights_P, kept_P2F, grad_weights_P)
        grad_source_MD = at_desks(work, jobs, source_MD, make)
        grads = (grad_gate_up, grad_gate_up_bias, grad_down, grad_down_bias)
        return grad_source_MD, padded.gather(grad_weights_P), *grads, *[None] * 6


class _Rows(NamedTuple):
    """What belongs to the rows of one expert: slices, so that writing to them writes to the whole."""

    source: Tensor
    weight: Tensor
    gate_up: Tensor | None
    grad_weight: Tensor


def _check(source_MD: Tensor, weights_P: Tensor, padded: Padded, gate_up: Tensor, down: Tensor) -> None:
    """What compiled code does not look at."""
    devices = {source_MD.device, weights_P.device, padded.source_of_row_P.device}
    if len(devices) > 1:
        raise ValueError(f"sources, weights of rows and copies are on different devices: {devices}")
    if gate_up.shape[1] != 2 * down.shape[2]:
        raise ValueError(
            f"gate and up have {gate_up.shape[1]} rows, not twice the {down.shape[2]} that down reads"
        )
    if weights_P.numel() != padded.source_of_row_P.numel():
        raise ValueError(f"{padded.source_of_row_P.numel()} rows have {weights_P.numel()} weights")
    padded.check(len(source_MD))


def _jobs(
    padded: Padded, weights_P: Tensor, gate_up_P2F: Tensor | None, grad_weights_P: Tensor | None = None
) -> list[Job[_Rows]]:
    """One for every expert that has rows."""
    counts = padded.rows_per_bucket
    grads = weights_P if grad_weights_P is None else grad_weights_P
    pieces = zip(
        padded.source_of_row_P.split(counts),
        weights_P.split(counts),
        [None] * len(counts) if gate_up_P2F is None else gate_up_P2F.split(counts),
        grads.split(counts),
        strict=True,
    )
    return [Job(e, n, _Rows(*rows)) for e, (n, rows) in enumerate(zip(counts, pieces, strict=True)) if n]


def _linear(
    desk: Desk, x: Tensor, weight: Tensor, biases: Tensor | None, expert: int, room: Tensor
) -> Tensor:
    rows = desk.multiply(x, desk.weight(weight).t(), room)
    return rows if biases is None else rows.add_(biases[expert])
