"""Root-mean-square normalisation over the last dimension, and the choice of a model's norm."""

import torch
from torch import Tensor, nn

from moe.config import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467), the statistics in float32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width], dtype kept."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def norm(config: ModelConfig) -> RMSNorm | nn.LayerNorm:
    """A norm of the residual stream."""
    if config.norm == "layer":
        return nn.LayerNorm(config.hidden_size, config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps)
