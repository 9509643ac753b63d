"""A shape and a seed -> one sparse layer's input and weights, and what every implementation must make of them.

T tokens, D width, F expert width, E experts, K choices.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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


@dataclass(frozen=True)
class Problem:
    """What all implementations are given, in one dtype."""

    shape: Shape
    x_TD: Tensor
    grad_TD: Tensor
    router_ED: Tensor
    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor

    @classmethod
    def draw(cls, shape: Shape, dtype: torch.dtype, seed: int = 0) -> "Problem":
        """Weights of unit gain, so that no dtype is favoured by tiny or huge numbers."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, gain: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator) * gain).to(dtype)

        t, d, f, e = shape.tokens, shape.hidden, shape.inner, shape.experts
        return cls(
            shape=shape,
            x_TD=normal(t, d),
            grad_TD=normal(t, d, gain=d**-0.5),
            router_ED=normal(e, d, gain=0.02),
            gate_EFD=normal(e, f, d, gain=d**-0.5),
            up_EFD=normal(e, f, d, gain=d**-0.5),
            down_EDF=normal(e, d, f, gain=f**-0.5),
        )

    def route(self, x_TD: Tensor, router_ED: Tensor) -> tuple[Tensor, Tensor]:
        """(weights [T, K] in x's dtype, ids [T, K]): softmax, the K best, normalised; for peers without a router."""
        scores_TE = torch.softmax(F.linear(x_TD.float(), router_ED.float()), dim=-1)
        weights_TK, ids_TK = scores_TE.topk(self.shape.top_k, dim=-1)
        return (weights_TK / weights_TK.sum(-1, keepdim=True)).to(x_TD.dtype), ids_TK


@dataclass(frozen=True)
class Answer:
    """Output and gradients: x [T, D], router [E, D], gate and up [E, F, D], down [E, D, F]."""

    y_TD: Tensor
    x_TD: Tensor
    router_ED: Tensor
    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor

    def error(self, right: "Answer") -> float:
        """Largest relative distance (Frobenius) of the six tensors from the right ones."""
        pairs = zip(vars(self).values(), vars(right).values(), strict=True)
        return max(float((ours.double() - exact).norm() / exact.norm()) for ours, exact in pairs)


def solve(problem: Problem) -> Answer:
    """The right answer in float64, expert by expert, on the choices made in the problem's own dtype."""
    _, ids_TK = problem.route(problem.x_TD, problem.router_ED)
    x, router, gate, up, down = (
        tensor.double().requires_grad_()
        for tensor in (problem.x_TD, problem.router_ED, problem.gate_EFD, problem.up_EFD, problem.down_EDF)
    )
    weights_TK = torch.softmax(x @ router.t(), -1).gather(1, ids_TK)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e, (gate_e, up_e, down_e) in enumerate(
        zip(gate.unbind(0), up.unbind(0), down.unbind(0), strict=True)
    ):
        token, choice = torch.where(ids_TK == e)
        h = F.silu(x[token] @ gate_e.t()) * (x[token] @ up_e.t())
        y = y.index_add(0, token, (h @ down_e.t()) * weights_TK[token, choice].unsqueeze(-1))
    y.backward(problem.grad_TD.double())
    grads = [leaf.grad for leaf in (x, router, gate, up, down)]
    assert all(grad is not None for grad in grads)
    return Answer(y.detach(), *(grad for grad in grads if grad is not None))
