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

    def activate(self, gate: Tensor, out: Tensor, sigmoid: Tensor | None = None) -> Tensor:
        """Write g sigmoid(alpha g) to `out` [n, F]; and sigmoid(alpha g) to `sigmoid`, for `backward` to use."""
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
        scaled = gate if self.alpha == 1 else gate * self.alpha
        if sigmoid is not None:
            return torch.mul(torch.sigmoid(scaled, out=sigmoid), gate, out=out)
        torch.ops.aten.silu.out(scaled, out=out)
        return out if self.alpha == 1 else out.div_(self.alpha)

    def scale(self, activated: Tensor, up: Tensor, out: Tensor) -> Tensor:
        """Write `activated` (u + offset) to `out` [n, F], which may be `activated`."""
        return torch.mul(activated, self._factor(up), out=out)

    def backward(
        self,
        gate: Tensor,
        up: Tensor,
        activated: Tensor,
        grad: Tensor,
        grad_gate: Tensor,
        grad_up: Tensor,
        sigmoid: Tensor | None = None,
    ) -> None:
        """Write the gradients of `gate` and `up`, all [n, F], from that of the product; overwrites `grad`.

        With what `activate` wrote to `sigmoid`, overwritten too, the exponential is not taken again: a third of
        the unit's time on CPU. A narrow dtype should leave it out, since 1 - s loses its digits there.
        """
        torch.mul(grad, activated, out=grad_up)
        grad.mul_(self._factor(up))
        if sigmoid is not None:
            # (g s)' = s + alpha g s (1 - s), on the way from s to 1
            way = activated if self.alpha == 1 else activated * self.alpha
            torch.mul(grad, torch.lerp(sigmoid, sigmoid.new_ones(()), way, out=sigmoid), out=grad_gate)
        else:
            g = gate if self.limit is None else gate.clamp(max=self.limit)
            # (g sigmoid(alpha g))' = silu'(alpha g)
            scaled = g if self.alpha == 1 else g * self.alpha
            torch.ops.aten.silu_backward.grad_input(grad, scaled, grad_input=grad_gate)
        if self.limit is not None:
            grad_gate.masked_fill_(gate > self.limit, 0)
            grad_up.masked_fill_(up.abs() > self.limit, 0)

    def _factor(self, up: Tensor) -> Tensor:
        if self.limit is not None:
            up = up.clamp(-self.limit, self.limit)
        return up + self.offset if self.offset else up
