"""transformers' Qwen3-MoE experts, by one of its implementations, behind the problem's router."""

import psutil
import torch
from torch import Tensor, nn

from moe.bench.peers.contender import Contender, Grads, Unavailable, grad
from moe.bench.problem import Problem


class HuggingFace(Contender):
    def __init__(self, problem: Problem, implementation: str) -> None:
        super().__init__()
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        shape = problem.shape
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.inner,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation_internal = implementation
        self.problem, self.router = problem, nn.Parameter(problem.router_ED)
        with torch.device("meta"):
            self.experts = Qwen3MoeExperts(config)
        self.experts.gate_up_proj = nn.Parameter(problem.gate_up_E2FD)
        self.experts.down_proj = nn.Parameter(problem.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = self.problem.route(x_TD, self.router)
        y_TD: Tensor = self.experts(x_TD, ids_TK, weights_TK)
        return y_TD

    def grads(self) -> Grads:
        gate, up = grad(self.experts.gate_up_proj).chunk(2, dim=1)
        return grad(self.router), gate, up, grad(self.experts.down_proj)


def batched_mm(problem: Problem) -> Contender:
    """The implementation that copies an expert's weights for each choice of each token.

    Raises `Unavailable`: no room for about five [T K, F, D], three of copies and the rest for gradients.
    """
    shape, x_TD = problem.shape, problem.x_TD
    needed = 5 * shape.tokens * shape.top_k * shape.inner * shape.hidden * x_TD.element_size()
    free = torch.cuda.mem_get_info(x_TD.device)[0] if x_TD.is_cuda else psutil.virtual_memory().available
    if needed > free:
        raise Unavailable(
            f"it copies the weights for each choice: {needed / 2**30:.0f} GiB, of which {free / 2**30:.0f} are free"
        )
    return HuggingFace(problem, "batched_mm")
