"""Gate and up pre-activations -> what the down projection reads; with a gradient written in place.

n rows, F expert width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import MoEConfig


@dataclass(frozen=True)
class GatedUnit:
    """g sigmoid(alpha g) (u + offset), with g = min(gate, limit) and u = clamp(up, -limit, limit).

    SwiGLU (arXiv:2002.05202) has alpha 1, offset 0 and no limit; GPT-OSS (arXiv:2508.10925) has alpha 1.702,
    offset 1 and limit 7.
    """

    alpha: float = 1.0
    offset: float = 0.0
    limit: float | None = None

    @classmethod
    def of(cls, config: MoEConfig) -> "GatedUnit":
        """What a model asks for."""
        if config.expert_activation == "gpt_oss":
            return cls(config.activation_alpha, 1.0, config.activation_limit)
        return cls(limit=config.activation_limit)

    def __call__(self, gate_up: Tensor) -> Tensor:
        """[..., 2F] -> [..., F], by autograd."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
        activated = F.silu(gate) if self.alpha == 1 else gate * torch.sigmoid(self.alpha * gate)
        return activated * self._factor(up)

    def activate(self, gate: Tensor, out: Tensor) -> Tensor:
        """Write g sigmoid(alpha g) to `out` [n, F]."""
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
        if self.alpha == 1:
            return torch.ops.aten.silu.out(gate, out=out)  # type: ignore[no-any-return]  # untyped
        return torch.ops.aten.silu.out(gate * self.alpha, out=out).div_(self.alpha)  # type: ignore[no-any-return]

    def scale(self, activated: Tensor, up: Tensor, out: Tensor) -> Tensor:
        """Write `activated` (u + offset) to `out` [n, F], which may be `activated`."""
        return torch.mul(activated, self._factor(up), out=out)

    def backward(
        self, gate: Tensor, up: Tensor, activated: Tensor, grad: Tensor, grad_gate: Tensor, grad_up: Tensor
    ) -> None:
        """Write the gradients of `gate` and `up`, all [n, F], from that of the product; overwrites `grad`."""
        torch.mul(grad, activated, out=grad_up)
        grad.mul_(self._factor(up))
        g = gate if self.limit is None else gate.clamp(max=self.limit)
        # (g sigmoid(alpha g))' = silu'(alpha g)
        torch.ops.aten.silu_backward.grad_input(
            grad, g if self.alpha == 1 else g * self.alpha, grad_input=grad_gate
        )
        if self.limit is not None:
            grad_gate.masked_fill_(gate > self.limit, 0)
            grad_up.masked_fill_(up.abs() > self.limit, 0)

    def _factor(self, up: Tensor) -> Tensor:
        if self.limit is not None:
            up = up.clamp(-self.limit, self.limit)
        return up + self.offset if self.offset else up
