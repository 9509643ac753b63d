"""torchtitan's MoE: its router, local dispatcher and grouped experts."""

import warnings

import torch
from torch import Tensor, nn

from moe.bench.peers.contender import Contender, Grads, Unavailable, grad
from moe.bench.problem import Problem


class TorchTitan(Contender):
    """Raises `Unavailable` in float32: its experts compute in bf16, whatever they are given."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        if problem.x_TD.dtype != torch.bfloat16:
            raise Unavailable("its experts compute in bf16 whatever the dtype of their weights")
        # Its router asks for autocast to float32, which torch does not know: the gate stays in bf16.
        warnings.filterwarnings(
            "ignore", message="In (CPU|CUDA) autocast, but the target dtype is not supported"
        )
        from torchtitan.models.common.linear import Linear
        from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
        from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

        shape = problem.shape
        config = MoE.Config(
            num_experts=shape.experts,
            routed_experts=RoutedExperts.Config(
                inner_experts=GroupedExperts.Config(
                    dim=shape.hidden, hidden_dim=shape.inner, num_experts=shape.experts
                ),
                token_dispatcher=LocalTokenDispatcher.Config(num_experts=shape.experts, top_k=shape.top_k),
            ),
            router=TokenChoiceTopKRouter.Config(
                num_experts=shape.experts,
                gate=Linear.Config(in_features=shape.hidden, out_features=shape.experts),
                top_k=shape.top_k,
                score_func="softmax",
                route_norm=True,
                _debug_force_load_balance=problem.routing == "forced",
            ),
            load_balance_coeff=None,
        )
        with torch.device("meta"):
            self.layer = config.build()
        self.layer._init_self_buffers(buffer_device=problem.x_TD.device)
        self.layer.router.gate.weight = nn.Parameter(problem.router_ED)
        self.experts = self.layer.routed_experts.inner_experts
        self.experts.w1_EFD, self.experts.w3_EFD = (
            nn.Parameter(problem.gate_EFD),
            nn.Parameter(problem.up_EFD),
        )
        self.experts.w2_EDF = nn.Parameter(problem.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_BTD: Tensor = self.layer(x_TD.unsqueeze(0))
        return y_BTD.squeeze(0)

    def choices(self, x_TD: Tensor) -> Tensor:
        ids_BTK: Tensor = self.layer.router(x_TD.unsqueeze(0))[1]
        return ids_BTK.squeeze(0)

    def grads(self) -> Grads:
        experts = self.experts
        return (
            grad(self.layer.router.gate.weight),
            grad(experts.w1_EFD),
            grad(experts.w3_EFD),
            grad(experts.w2_EDF),
        )
