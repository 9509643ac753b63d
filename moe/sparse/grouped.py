"""All experts in one autograd node by torch's grouped GEMM: CUDA's way, one kernel for each product.

M sources, R rows at their experts, D width, F expert width, e experts held here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.sparse.activation import GatedUnit
from moe.sparse.copies import Copies, sum_rows
from moe.sparse.once import first_derivative_only


class GroupedExperts(torch.autograd.Function):
    """The same as `LoopedExperts`, without a wait for the device.

    Kept for backward per row: 2F pre-activations, or nothing with `recompute`; rows are copied from their
    sources a second time rather than kept.
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
        ends = copies.counts.cumsum(0).to(torch.int32)
        expert_of_row_R = _expert_of_row(copies) if gate_up_bias is not None else None
        weights_R = weights_R.to(source_MD.dtype)
        x_RD = source_MD.index_select(0, copies.source_of_row_R)
        both_R2F = _linear(x_RD, gate_up, gate_up_bias, ends, expert_of_row_R)
        h_RF = unit(both_R2F).mul_(weights_R.unsqueeze(1))
        out_RD = F.grouped_mm(h_RF, down.transpose(1, 2), offs=ends)
        if down_bias is not None:
            out_RD = out_RD.addcmul_(weights_R.unsqueeze(1), down_bias[expert_of_row_R])
        kept = None if recompute else both_R2F
        ctx.save_for_backward(source_MD, weights_R, kept, gate_up, gate_up_bias, down, down_bias)
        ctx.copies, ctx.unit, ctx.ends, ctx.expert_of_row_R = copies, unit, ends, expert_of_row_R
        return sum_rows(out_RD, copies)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        source_MD, weights_R, both_R2F, gate_up, gate_up_bias, down, down_bias = ctx.saved_tensors
        copies, unit, ends, expert_of_row_R = ctx.copies, ctx.unit, ctx.ends, ctx.expert_of_row_R
        needs_gate_up, needs_gate_up_bias, needs_down, needs_down_bias = ctx.needs_input_grad[2:6]
        if needs_gate_up or both_R2F is None:
            x_RD = source_MD.index_select(0, copies.source_of_row_R)
        if both_R2F is None:
            both_R2F = _linear(x_RD, gate_up, gate_up_bias, ends, expert_of_row_R)
        weight_R1 = weights_R.unsqueeze(1)
        grad_out_RD = grad_MD.contiguous().index_select(0, copies.source_of_row_R)
        gate_RF, up_RF = both_R2F.chunk(2, dim=1)
        activated_RF = unit.activate(gate_RF, out=weights_R.new_empty(len(weights_R), down.shape[2]))
        h_RF = unit.scale(activated_RF, up_RF, torch.empty_like(activated_RF))
        grad_h_RF = F.grouped_mm(grad_out_RD, down, offs=ends)
        grad_weights_R = torch.mul(grad_h_RF, h_RF).sum(1, dtype=torch.float32)
        grad_down = grad_gate_up = None
        if needs_down:
            grad_down = F.grouped_mm(grad_out_RD.t(), h_RF.mul_(weight_R1), offs=ends)
        grad_gate_up_bias = grad_down_bias = None
        if down_bias is not None:
            grad_weights_R += (grad_out_RD * down_bias[expert_of_row_R]).sum(1, dtype=torch.float32)
        if needs_down_bias:
            grad_down_bias = _sum_by_expert(grad_out_RD * weight_R1, expert_of_row_R, down_bias)
        grad_both_R2F = torch.empty_like(both_R2F)
        grad_h_RF.mul_(weight_R1)
        unit.backward(gate_RF, up_RF, activated_RF, grad_h_RF, *grad_both_R2F.chunk(2, dim=1))
        if needs_gate_up:
            grad_gate_up = F.grouped_mm(grad_both_R2F.t(), x_RD, offs=ends)
        if needs_gate_up_bias:
            grad_gate_up_bias = _sum_by_expert(grad_both_R2F, expert_of_row_R, gate_up_bias)
        grad_source_MD = sum_rows(F.grouped_mm(grad_both_R2F, gate_up, offs=ends), copies)
        grads = (grad_gate_up, grad_gate_up_bias, grad_down, grad_down_bias)
        return grad_source_MD, grad_weights_R, *grads, None, None, None


def fits(source_MD: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether the kernel takes these on a GPU: bf16, rows that start at multiples of 16 bytes."""
    return (
        source_MD.is_cuda
        and gate_up.dtype == source_MD.dtype == torch.bfloat16
        and gate_up.shape[2] % 8 == 0
        and down.shape[2] % 8 == 0
    )


def _linear(x_RD: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, expert: Tensor | None) -> Tensor:
    y = F.grouped_mm(x_RD, weight.transpose(1, 2), offs=ends)
    return y if bias is None else y.add_(bias[expert])


_PART = 8192
"""Rows that are widened at a time."""


def _sum_by_expert(rows: Tensor, expert_of_row_R: Tensor, bias: Tensor) -> Tensor:
    """As `bias` [e, width]: an expert's rows added up, in float32 at least, so that bf16 rounds once."""
    wide = torch.promote_types(bias.dtype, torch.float32)
    sums = torch.zeros_like(bias, dtype=wide)
    for part, expert in zip(rows.split(_PART), expert_of_row_R.split(_PART), strict=True):
        sums.index_add_(0, expert, part.to(wide))
    return sums.to(bias.dtype)


def _expert_of_row(copies: Copies) -> Tensor:
    experts = torch.arange(copies.counts.numel(), device=copies.counts.device)
    return experts.repeat_interleave(copies.counts, output_size=copies.choice_of_row_R.numel())
