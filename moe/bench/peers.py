"""The same layer by others, on the same weights; each says its version and gives back comparable gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.bench.problem import Problem
from moe.config import MoEConfig
from moe.sparse import ExpertLayout, SparseMoE


class Contender(nn.Module):
    """x [T, D] -> y [T, D]; `grads` gives router, gate, up and down gradients, or None if it has other weights."""

    def grads(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        return None


@dataclass(frozen=True)
class Entry:
    """A line of the table."""

    name: str
    package: str
    build: Callable[[Problem], Contender]

    @property
    def version(self) -> str:
        return version(self.package)


class Dense(Contender):
    """The limit: one SwiGLU of the same active FLOPs, K F wide; no routing, no experts."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        shape, dtype = problem.shape, problem.x_TD.dtype
        width = shape.inner * shape.top_k
        draw = torch.Generator().manual_seed(1)
        gate_up = torch.randn(2 * width, shape.hidden, generator=draw) * shape.hidden**-0.5
        down = torch.randn(shape.hidden, width, generator=draw) * width**-0.5
        self.gate_up, self.down = nn.Parameter(gate_up.to(dtype)), nn.Parameter(down.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)


class Ours(Contender):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        shape = problem.shape
        config = MoEConfig(num_experts=shape.experts, top_k=shape.top_k, expert_intermediate_size=shape.inner)
        self.layer = SparseMoE(shape.hidden, config, ExpertLayout(shape.experts)).to(problem.x_TD.dtype)
        self.layer.router.weight.data.copy_(problem.router_ED)
        self.layer.experts.gate_up.data.copy_(torch.cat([problem.gate_EFD, problem.up_EFD], 1))
        self.layer.experts.down.data.copy_(problem.down_EDF)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y

    def grads(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _grads(self.layer.router.weight, self.layer.experts.gate_up, self.layer.experts.down)


class HuggingFace(Contender):
    """transformers' Qwen3-MoE experts, by one of its implementations, behind the plain router."""

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
        self.problem, self.router = problem, nn.Parameter(problem.router_ED.clone())
        self.experts = Qwen3MoeExperts(config)
        self.experts.gate_up_proj.data = torch.cat([problem.gate_EFD, problem.up_EFD], 1)
        self.experts.down_proj.data = problem.down_EDF.clone()

    def forward(self, x: Tensor) -> Tensor:
        weights_TK, ids_TK = self.problem.route(x, self.router)
        y: Tensor = self.experts(x, ids_TK, weights_TK)
        return y

    def grads(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _grads(self.router, self.experts.gate_up_proj, self.experts.down_proj)


class DeepSpeed(Contender):
    """DeepSpeed's GroupedExperts, the heart of AutoEP, behind the plain router and a sort."""

    def __init__(self, problem: Problem, grouped: bool) -> None:
        super().__init__()
        from moe.engine.library import deepspeed  # noqa: F401  (sets up the accelerator)

        from deepspeed.moe.ep_experts import GroupedExperts  # isort: skip

        shape = problem.shape
        self.problem, self.router = problem, nn.Parameter(problem.router_ED.clone())
        self.experts = GroupedExperts(
            shape.hidden, shape.inner, shape.experts, use_grouped_mm=grouped, disable_triton_grouped_mm=True
        )
        self.experts.w1.data = problem.gate_EFD.clone()
        self.experts.w3.data = problem.up_EFD.clone()
        self.experts.w2.data = problem.down_EDF.clone()

    def forward(self, x: Tensor) -> Tensor:
        weights_TK, ids_TK = self.problem.route(x, self.router)
        ids_N = ids_TK.reshape(-1)
        order_N = torch.argsort(ids_N, stable=True)
        token_N = order_N // self.problem.shape.top_k
        counts_E = torch.bincount(ids_N, minlength=self.problem.shape.experts)
        rows_ND = self.experts(x[token_N], counts_E) * weights_TK.reshape(-1)[order_N].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token_N, rows_ND)

    def grads(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = [p.grad for p in (self.router, self.experts.w1, self.experts.w3, self.experts.w2)]
        router, gate, up, down = (grad for grad in found if grad is not None)
        return router, gate, up, down


def _grads(router: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert router.grad is not None
    assert gate_up.grad is not None
    assert down.grad is not None
    gate, up = gate_up.grad.chunk(2, dim=1)
    return router.grad, gate, up, down.grad


ENTRIES = (
    Entry("dense limit", "torch", Dense),
    Entry("turnout", "turnout", Ours),
    Entry("HF grouped_mm", "transformers", lambda problem: HuggingFace(problem, "grouped_mm")),
    Entry("HF eager", "transformers", lambda problem: HuggingFace(problem, "eager")),
    Entry("DeepSpeed grouped_mm", "deepspeed", lambda problem: DeepSpeed(problem, grouped=True)),
    Entry("DeepSpeed loop", "deepspeed", lambda problem: DeepSpeed(problem, grouped=False)),
)
