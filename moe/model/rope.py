"""Positions -> rotations of query and key pairs (arXiv:2104.09864).

B sequences, S positions, H heads, d head width. Pairs are (i, i + d/2), as Llama and its heirs store them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine of every angle, [S, d], float32."""

    cos_Sd: Tensor
    sin_Sd: Tensor

    def apply(self, x_BHSd: Tensor) -> Tensor:
        """Rotate queries or keys [B, H, S, d]; dtype kept."""
        first, second = x_BHSd.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return x_BHSd * self.cos_Sd.to(x_BHSd.dtype) + turned * self.sin_Sd.to(x_BHSd.dtype)


def rotation(length: int, head_dim: int, theta: float, device: torch.device) -> Rotation:
    """Angles position * theta^(-2i/d) for positions 0 to length - 1."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float()
    frequency_p = 1.0 / (theta ** (pairs / head_dim))
    position_S = torch.arange(length, device=device).float()
    angle_Sd = torch.outer(position_S, frequency_p).repeat(1, 2)
    return Rotation(angle_Sd.cos(), angle_Sd.sin())
