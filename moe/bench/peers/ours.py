"""This project's sparse layer."""

from torch import Tensor, nn

from moe.bench.peers.contender import Contender, Grads, grad
from moe.bench.problem import Problem
from moe.config import MoEConfig
from moe.sparse import ExpertLayout, SparseMoE


class Ours(Contender):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        shape, x_TD = problem.shape, problem.x_TD
        with x_TD.device:
            self.layer = SparseMoE(shape.hidden, _config(problem), ExpertLayout(shape.experts))
        self.layer.router.weight = nn.Parameter(problem.router_ED)
        self.layer.experts.gate_up = nn.Parameter(problem.gate_up_E2FD)
        self.layer.experts.down = nn.Parameter(problem.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.layer(x_TD)[0]
        return y_TD

    def choices(self, x_TD: Tensor) -> Tensor:
        ids_TK: Tensor = self.layer(x_TD)[1].ids_TK
        return ids_TK

    def grads(self) -> Grads:
        gate, up = grad(self.layer.experts.gate_up).chunk(2, dim=1)
        return grad(self.layer.router.weight), gate, up, grad(self.layer.experts.down)


def _config(problem: Problem) -> MoEConfig:
    shape = problem.shape
    return MoEConfig(
        num_experts=shape.experts,
        top_k=shape.top_k,
        expert_intermediate_size=shape.inner,
        router_choice="round_robin" if problem.routing == "forced" else "token",
    )
