"""A dense SwiGLU: the feed-forward block of dense layers, and the expert that every token visits.

T tokens, D width, F inner width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moe.sparse.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, intermediate_size, bias=False)
        self.up = Linear(hidden_size, intermediate_size, bias=False)
        self.down = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        y_TD: Tensor = self.down(F.silu(self.gate(x_TD)) * self.up(x_TD))
        return y_TD
