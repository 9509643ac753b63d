"""A shape and a seed -> one sparse layer's input and weights, and what every implementation must make of them.

T tokens, D width, F expert width, E experts, K choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe import seed

RoutingKind = Literal["real", "forced"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer and its batch."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int

    @property
    def flops(self) -> int:
        """Forward and backward of the experts' matmuls."""
        return self.tokens * self.top_k * 3 * 6 * self.hidden * self.inner


PRESETS = {
    "small": Shape(tokens=4096, hidden=512, inner=256, experts=64, top_k=8),
    "olmoe": Shape(tokens=2048, hidden=2048, inner=1024, experts=64, top_k=8),
    "qwen3-30b-a3b": Shape(tokens=2048, hidden=2048, inner=768, experts=128, top_k=8),
}
"""OLMoE-1B-7B: arXiv:2409.02060, table 1; Qwen3-30B-A3B: arXiv:2505.09388, table 2, and its config.json."""


@dataclass(frozen=True)
class Problem:
    """What all implementations are given, in one dtype and on one device."""

    shape: Shape
    routing: RoutingKind
    x_TD: Tensor
    grad_TD: Tensor
    router_ED: Tensor
    gate_EFD: Tensor
    up_EFD: Tensor
    gate_up_E2FD: Tensor
    """The same once more in one piece: some store it so."""
    down_EDF: Tensor

    @classmethod
    def draw(
        cls,
        shape: Shape,
        dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        routing: RoutingKind = "real",
    ) -> "Problem":
        """Weights of unit gain, so that no dtype is favoured by tiny or huge numbers; the same on every device."""

        def normal(name: str, *size: int, gain: float = 1.0) -> Tensor:
            return _normal(seed.stream("bench", name), size, gain).to(device=device, dtype=dtype)

        t, d, f, e = shape.tokens, shape.hidden, shape.inner, shape.experts
        gate_EFD, up_EFD = (normal(name, e, f, d, gain=d**-0.5) for name in ("gate", "up"))
        return cls(
            shape=shape,
            routing=routing,
            x_TD=normal("x", t, d),
            grad_TD=normal("gradient", t, d, gain=d**-0.5),
            router_ED=normal("router", e, d, gain=0.02),
            gate_EFD=gate_EFD,
            up_EFD=up_EFD,
            gate_up_E2FD=torch.cat([gate_EFD, up_EFD], dim=1),
            down_EDF=normal("down", e, d, f, gain=f**-0.5),
        )

    def with_input(self, number: int) -> "Problem":
        """The same layer with another batch, whose tokens choose otherwise, as in training."""
        x_TD = _normal(seed.stream("bench x", number), self.x_TD.shape, 1.0)
        return replace(self, x_TD=x_TD.to(self.x_TD))

    def route(self, x_TD: Tensor, router_ED: Tensor) -> tuple[Tensor, Tensor]:
        """(weights [T, K] in x's dtype, ids [T, K]): softmax in float32, K choices, normalised.

        The router of contenders that have none of their own.
        """
        scores_TE = torch.softmax(F.linear(x_TD.float(), router_ED.float()), dim=-1)
        ids_TK = self.choose(scores_TE)
        weights_TK = scores_TE.gather(1, ids_TK)
        return (weights_TK / weights_TK.sum(-1, keepdim=True)).to(x_TD.dtype), ids_TK

    def choose(self, scores_TE: Tensor) -> Tensor:
        """Expert ids [T, K]: the K best, or, forced, in turn, so that every expert gets the same load."""
        if self.routing == "real":
            return scores_TE.topk(self.shape.top_k, dim=-1).indices
        choices_N = torch.arange(scores_TE.shape[0] * self.shape.top_k, device=scores_TE.device)
        return (choices_N % self.shape.experts).view(-1, self.shape.top_k)

    def choices(self) -> Tensor:
        """Expert ids [T, K] of its own input."""
        return self.route(self.x_TD, self.router_ED)[1]


def _normal(generator: torch.Generator, size: Sequence[int], gain: float) -> Tensor:
    return torch.randn(*size, generator=generator).mul_(gain)


@dataclass(frozen=True)
class Answer:
    """Output and gradients: x [T, D], router [E, D], gate and up [E, F, D], down [E, D, F]."""

    y_TD: Tensor
    x_TD: Tensor
    router_ED: Tensor
    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor

    def errors(self, right: "Answer") -> dict[str, float]:
        """Relative distance (Frobenius) of each of the six tensors from the right one."""
        names = ("output", "input", "router", "gate", "up", "down")
        pairs = zip(names, vars(self).values(), vars(right).values(), strict=True)
        return {name: _norm(ours - exact) / _norm(exact) for name, ours, exact in pairs}


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def solve(problem: Problem, ids_TK: Tensor | None = None) -> Answer:
    """The right answer by float64, expert by expert, on the choices given, or else the problem's own.

    The experts' gradients are kept in float32 where the problem is no wider: those of a real model are gigabytes.
    """
    ids_TK = problem.choices() if ids_TK is None else ids_TK
    x, router = (t.detach().double().requires_grad_() for t in (problem.x_TD, problem.router_ED))
    weights_TK = torch.softmax(x @ router.t(), -1).gather(1, ids_TK)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    # Leaves of the experts' part, so that each expert's graph ends before the next one's begins.
    rows, share_TK = x.detach().requires_grad_(), weights_TK.detach().requires_grad_()
    y, grad = torch.zeros_like(x), problem.grad_TD.double()
    stacked = (problem.gate_EFD, problem.up_EFD, problem.down_EDF)
    kept = torch.promote_types(problem.x_TD.dtype, torch.float32)
    grads = [torch.zeros_like(weight, dtype=kept) for weight in stacked]
    for e in range(problem.shape.experts):
        token, choice = torch.where(ids_TK == e)
        leaves = [weight[e].detach().double().requires_grad_() for weight in stacked]
        gate, up, down = leaves
        h = F.silu(rows[token] @ gate.t()) * (rows[token] @ up.t())
        out = (h @ down.t()) * share_TK[token, choice].unsqueeze(-1)
        out.backward(grad[token])
        y.index_add_(0, token, out.detach())
        for whole, leaf in zip(grads, leaves, strict=True):
            assert leaf.grad is not None
            whole[e] = leaf.grad
    assert share_TK.grad is not None
    weights_TK.backward(share_TK.grad)
    assert x.grad is not None
    assert rows.grad is not None
    assert router.grad is not None
    return Answer(y, rows.grad + x.grad, router.grad, *grads)
