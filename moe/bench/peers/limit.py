"""The dense limit: one SwiGLU of the same active FLOPs, K F wide; no routing, no experts. By torch, and by ours."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import seed
from moe.bench.peers.contender import Contender
from moe.bench.problem import Problem
from moe.sparse.swiglu import SwiGLU


class Dense(Contender):
    """In plain torch."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        gate_up, down = _weights(problem)
        self.gate_up, self.down = nn.Parameter(gate_up), nn.Parameter(down)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = F.linear(x_TD, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)


class DenseBlock(Contender):
    """As this project's dense layers have it, which choose among torch's libraries as its experts do."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        gate_up, down = _weights(problem)
        self.block = SwiGLU(down.shape[0], down.shape[1])
        gate, up = gate_up.chunk(2)
        for map_, weight in ((self.block.gate, gate), (self.block.up, up), (self.block.down, down)):
            map_.weight = nn.Parameter(weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.block(x_TD)
        return y_TD


def _weights(problem: Problem) -> tuple[Tensor, Tensor]:
    """Gate and up [2 K F, D], and down [D, K F]."""
    shape, width = problem.shape, problem.shape.inner * problem.shape.top_k
    draw = seed.stream("bench", "dense limit")
    gate_up = torch.randn(2 * width, shape.hidden, generator=draw) * shape.hidden**-0.5
    down = torch.randn(shape.hidden, width, generator=draw) * width**-0.5
    return gate_up.to(problem.x_TD), down.to(problem.x_TD)
