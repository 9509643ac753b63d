"""Rows sorted by expert -> each expert's SwiGLU of its rows.

R rows, D width, F expert width, e experts held here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.sparse.plan import ExpertLayout


class Experts(nn.Module):
    """down(silu(gate x) * up x) for each local expert (arXiv:2002.05202), gate and up in one weight."""

    def __init__(self, hidden_size: int, intermediate_size: int, layout: ExpertLayout) -> None:
        super().__init__()
        self.layout = layout
        self.gate_up = nn.Parameter(torch.empty(layout.num_local_experts, 2 * intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(layout.num_local_experts, hidden_size, intermediate_size))

    def forward(self, rows_RD: Tensor, rows_per_expert: list[int]) -> Tensor:
        """[R, D] -> [R, D]; `rows_per_expert` sums to R. An expert without rows gets a zero gradient."""
        if rows_RD.is_cuda and _fits_grouped_mm(self.gate_up, self.down):
            return grouped_swiglu(rows_RD, rows_per_expert, self.gate_up, self.down)
        return _LoopedSwiGLU.apply(rows_RD, rows_per_expert, self.gate_up, self.down)  # type: ignore[no-any-return]  # Function.apply is untyped


def grouped_swiglu(rows_RD: Tensor, rows_per_expert: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    """All experts by torch's grouped GEMM: one kernel for each of the two products on CUDA.

    bf16; widths a multiple of 8, so that rows start at 16 bytes.
    """
    ends = torch.tensor(rows_per_expert, device=rows_RD.device).cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(rows_RD, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)


def _fits_grouped_mm(gate_up: Tensor, down: Tensor) -> bool:
    return gate_up.dtype == torch.bfloat16 and gate_up.shape[2] % 8 == 0 and down.shape[2] % 8 == 0


class _LoopedSwiGLU(torch.autograd.Function):
    """One autograd node for all experts, each writing its rows and weight gradients in place.

    All work on an expert's rows is done before the next one's, so that they stay in the cache. Indexing a stacked
    parameter expert by expert would make autograd build a zero [e, ...] gradient for each. Kept for backward per
    row: D inputs and 2F pre-activations.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, rows_per_expert: list[int], gate_up: Tensor, down: Tensor
    ) -> Tensor:
        gate_up_RF = rows_RD.new_empty(rows_RD.shape[0], gate_up.shape[1])
        out_RD = torch.empty_like(rows_RD)
        hidden = _Scratch(rows_RD, rows_per_expert, down.shape[2])
        for e, rows in _blocks(rows_per_expert):
            both = torch.mm(rows_RD[rows], gate_up[e].t(), out=gate_up_RF[rows])
            gate, up = both.chunk(2, dim=-1)
            h = torch.ops.aten.silu.out(gate, out=hidden.rows(rows)).mul_(up)
            torch.mm(h, down[e].t(), out=out_RD[rows])
        ctx.save_for_backward(rows_RD, gate_up_RF, gate_up, down)
        ctx.rows_per_expert = rows_per_expert
        return out_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        rows_RD, gate_up_RF, gate_up, down = ctx.saved_tensors
        counts, width = ctx.rows_per_expert, down.shape[2]
        grad_RD, grad_rows_RD = grad_RD.contiguous(), torch.empty_like(rows_RD)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        activated, hidden, grad_hidden = (_Scratch(rows_RD, counts, width) for _ in range(3))
        grad_both = _Scratch(rows_RD, counts, 2 * width)
        for e in (e for e, count in enumerate(counts) if not count):
            grad_gate_up[e].zero_()
            grad_down[e].zero_()
        for e, rows in _blocks(counts):
            gate, up = gate_up_RF[rows].chunk(2, dim=-1)
            silu = torch.ops.aten.silu.out(gate, out=activated.rows(rows))
            torch.mm(grad_RD[rows].t(), torch.mul(silu, up, out=hidden.rows(rows)), out=grad_down[e])
            grad_h = torch.mm(grad_RD[rows], down[e], out=grad_hidden.rows(rows))
            both = grad_both.rows(rows)
            grad_gate, grad_up = both.chunk(2, dim=-1)
            torch.mul(grad_h, silu, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad_h.mul_(up), gate, grad_input=grad_gate)
            torch.mm(both.t(), rows_RD[rows], out=grad_gate_up[e])
            torch.mm(both, gate_up[e], out=grad_rows_RD[rows])
        return grad_rows_RD, None, grad_gate_up, grad_down


class _Scratch:
    """Room for the rows of one expert at a time."""

    def __init__(self, like: Tensor, rows_per_expert: list[int], width: int) -> None:
        self.buffer = like.new_empty(max(rows_per_expert, default=0), width)

    def rows(self, rows: slice) -> Tensor:
        """As many rows as `rows` spans; their content is whatever was there."""
        return self.buffer[: rows.stop - rows.start]


def _blocks(rows_per_expert: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any."""
    blocks, start = [], 0
    for expert, count in enumerate(rows_per_expert):
        if count:
            blocks.append((expert, slice(start, start + count)))
        start += count
    return blocks
