"""The dense limit: one SwiGLU of the same active FLOPs, K F wide; no routing, no experts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import seed
from moe.bench.peers.contender import Contender
from moe.bench.problem import Problem


class Dense(Contender):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        shape, x_TD = problem.shape, problem.x_TD
        width = shape.inner * shape.top_k
        draw = seed.stream("bench", "dense limit")
        gate_up = torch.randn(2 * width, shape.hidden, generator=draw) * shape.hidden**-0.5
        down = torch.randn(shape.hidden, width, generator=draw) * width**-0.5
        self.gate_up, self.down = nn.Parameter(gate_up.to(x_TD)), nn.Parameter(down.to(x_TD))

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = F.linear(x_TD, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)
