"""The experts held here: their weights, and rows -> each expert's output of its rows, weighted and summed.

M sources, R rows at their experts, D width, F expert width, e experts held here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.sparse.activation import GatedUnit
from moe.sparse.compiled import desk_for
from moe.sparse.copies import Copies
from moe.sparse.grouped import GroupedExperts, fits
from moe.sparse.looped import LoopedExperts
from moe.sparse.plan import ExpertLayout
from moe.sparse.product import Products
from moe.sparse.spare import Spare


@dataclass(frozen=True)
class Rows:
    """What reaches the experts here: sources, and which expert reads which with what weight."""

    source_MD: Tensor
    weights_R: Tensor
    """How much each row counts in the sum of its source."""
    copies: Copies


class Experts(nn.Module):
    """down(unit(gate x, up x)) for each local expert, gate and up in one weight, gate first."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        layout: ExpertLayout,
        unit: GatedUnit | None = None,
        bias: bool = False,
        recompute: bool = False,
        spare: Spare | None = None,
    ) -> None:
        """`unit` is the activation (default: SwiGLU); `recompute` keeps no pre-activation for backward; `spare` is what
        layers whose gradients do not live at once share (None: its own).
        """
        super().__init__()
        self.layout, self.unit, self.recompute = layout, unit or GatedUnit(), recompute
        self.spare = spare or Spare()
        held, inner = layout.num_local_experts, intermediate_size
        self.gate_up = nn.Parameter(torch.empty(held, 2 * inner, hidden_size))
        self.down = nn.Parameter(torch.empty(held, hidden_size, inner))
        self.gate_up_bias = nn.Parameter(torch.empty(held, 2 * inner)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(held, hidden_size)) if bias else None

    def forward(self, rows: Rows) -> Tensor:
        """[M, D]: each source's weighted sum over its rows. An expert without rows gets a zero gradient."""
        arguments = (
            rows.source_MD,
            rows.weights_R,
            self.gate_up,
            self.gate_up_bias,
            self.down,
            self.down_bias,
            rows.copies,
            self.unit,
            self.recompute,
        )
        y_MD: Tensor
        if fits(rows.source_MD, self.gate_up, self.down):
            y_MD = GroupedExperts.apply(*arguments)
        else:
            usual_rows = rows.copies.choice_of_row_R.numel() // max(1, self.layout.num_local_experts)
            products = Products.of(rows.source_MD, usual_rows, self.down[0])
            kind = desk_for(rows.source_MD, products.dtype)
            y_MD = LoopedExperts.apply(*arguments, products, kind, self.spare)
        return y_MD
