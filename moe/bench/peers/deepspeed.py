"""DeepSpeed's expert parallelism on one rank: its experts alone, and AutoEP's whole layer."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from moe.bench.peers.contender import Contender, Grads, grad
from moe.bench.problem import Problem


class Experts(Contender):
    """GroupedExperts, the heart of AutoEP, behind the problem's router and a sort."""

    def __init__(self, problem: Problem, grouped: bool) -> None:
        super().__init__()
        _import(problem)
        from deepspeed.moe.ep_experts import GroupedExperts

        shape = problem.shape
        self.problem, self.router = problem, nn.Parameter(problem.router_ED)
        with torch.device("meta"):
            self.experts = GroupedExperts(
                shape.hidden,
                shape.inner,
                shape.experts,
                use_grouped_mm=grouped,
                disable_triton_grouped_mm=True,
            )
        _share(self.experts, problem)

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = self.problem.route(x_TD, self.router)
        ids_N = ids_TK.reshape(-1)
        order_N = torch.argsort(ids_N, stable=True)
        token_N = order_N // self.problem.shape.top_k
        counts_E = torch.bincount(ids_N, minlength=self.problem.shape.experts)
        rows_ND = self.experts(x_TD[token_N], counts_E) * weights_TK.reshape(-1)[order_N].unsqueeze(-1)
        return torch.zeros_like(x_TD).index_add(0, token_N, rows_ND)

    def grads(self) -> Grads:
        return grad(self.router), *_expert_grads(self.experts)


class AutoEP(Contender):
    """The layer that AutoEP puts in place of a transformers block, with the settings of its Qwen3-MoE preset.

    It keeps its own router, whose matmul runs in the model's dtype. Finding blocks by preset is left out: that
    fails with transformers 5.23, and is no part of the layer.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        _import(problem)
        from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

        shape = problem.shape
        spec = MoELayerSpec(
            moe_module_name="mlp",
            model_family="qwen3_moe",
            router_name="gate",
            experts_name="experts",
            expert_storage="fused_3d",
            expert_w1_name="gate_up_proj",
            expert_w2_name="down_proj",
            expert_w3_name=None,
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden_size=shape.hidden,
            ffn_hidden_size=shape.inner,
            score_func="softmax",
            score_apply="post",
            route_norm=True,
            gate_bias=False,
            return_router_logits=False,
            router_logits_capture_target="none",
            router_logits_capture_index=None,
            router_logits_capture_layer_name=None,
            has_shared_experts=False,
            shared_experts_name="",
        )
        self.layer = AutoEPMoELayer(
            spec, _Block(problem), ep_size=1, ep_rank=0, config=AutoEPConfig(enabled=True)
        )
        _share(self.layer.experts, problem)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_BTD: Tensor = self.layer(x_TD.unsqueeze(0))
        return y_BTD.squeeze(0)

    def choices(self, x_TD: Tensor) -> Tensor:
        ids_TK: Tensor = self.layer.router(x_TD)[1]
        return ids_TK

    def grads(self) -> Grads:
        return grad(self.layer.router.gate.weight), *_expert_grads(self.layer.experts)


class _Block(nn.Module):
    """A mixture-of-experts block as transformers has it, for AutoEP to take the weights from."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.gate, self.experts = nn.Module(), nn.Module()
        self.gate.weight = nn.Parameter(problem.router_ED)
        self.experts.gate_up_proj = nn.Parameter(problem.gate_up_E2FD)
        self.experts.down_proj = nn.Parameter(problem.down_EDF)


def _import(problem: Problem) -> None:
    """DeepSpeed, told the device before it guesses."""
    if not problem.x_TD.is_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from moe.engine.library import deepspeed  # noqa: F401  (sets up the accelerator)


def _share(experts: Any, problem: Problem) -> None:
    experts.w1, experts.w3 = nn.Parameter(problem.gate_EFD), nn.Parameter(problem.up_EFD)
    experts.w2 = nn.Parameter(problem.down_EDF)


def _expert_grads(experts: Any) -> tuple[Tensor, Tensor, Tensor]:
    return grad(experts.w1), grad(experts.w3), grad(experts.w2)
