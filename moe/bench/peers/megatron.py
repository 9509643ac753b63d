"""Megatron-Core's MoELayer with SequentialMLP, the experts that need no Transformer Engine."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from moe.bench.peers.contender import Contender, Grads, grad
from moe.bench.problem import Problem


class Megatron(Contender):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Transformer Engine and Apex, which play no part here
            self.layer = _layer(problem)
        self.layer.to(problem.x_TD.device)
        self.layer.router.weight = nn.Parameter(problem.router_ED)
        self.experts = self.layer.experts.local_experts
        for expert, gate_up, down in zip(self.experts, problem.gate_up_E2FD, problem.down_EDF, strict=True):
            expert.linear_fc1.weight = nn.Parameter(gate_up)
            expert.linear_fc2.weight = nn.Parameter(down)
        if problem.routing == "forced":
            from megatron.core.transformer.moe.router_replay import RouterReplayAction

            self.layer.router.router_replay.set_target_indices(problem.choices())
            self.layer.router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TBD: Tensor = self.layer(x_TD.unsqueeze(1))[0]
        return y_TBD.squeeze(1)

    def choices(self, x_TD: Tensor) -> Tensor:
        chosen_TE: Tensor = self.layer.router(x_TD.unsqueeze(1))[1]
        return chosen_TE.int().topk(self.layer.config.moe_router_topk, dim=-1).indices

    def grads(self) -> Grads:
        gate_up = torch.stack([grad(expert.linear_fc1.weight) for expert in self.experts])
        gate, up = gate_up.chunk(2, dim=1)
        down = torch.stack([grad(expert.linear_fc2.weight) for expert in self.experts])
        return grad(self.layer.router.weight), gate, up, down


def _layer(problem: Problem) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    class PlainRouter(TopKRouter):
        """Megatron-Core 0.16.1 moves a router's weight to CUDA and needs Transformer Engine for its matmul."""

        def gating(self, input: Tensor) -> Tensor:
            return F.linear(input.float(), self.weight.float())

    shape, x_TD = problem.shape, problem.x_TD
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    alone = dist.group.WORLD
    names = ("tp", "cp", "tp_cp", "tp_dp_cp", "ep", "tp_ep", "expt_tp", "expt_dp")
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=1,
        ffn_hidden_size=shape.inner,
        moe_ffn_hidden_size=shape.inner,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.top_k,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",  # noqa: S106  no password
        moe_enable_routing_replay=problem.routing == "forced",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        params_dtype=x_TD.dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    projections = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = ModuleSpec(module=SequentialMLP, submodules=projections)
    return MoELayer(
        config,
        MoESubmodules(experts=experts, router=PlainRouter),
        pg_collection=ProcessGroupCollection(**dict.fromkeys(names, alone)),
    )
