"""Positions -> rotations of query and key pairs (arXiv:2104.09864), stretched for longer sequences if asked.

B sequences, S positions, H heads, d head width, r of it rotated. Pairs are (i, i + r/2), as Llama and its heirs store
them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config.attention import RopeScaling


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine of every angle, [S, r], float32."""

    cos_Sr: Tensor
    sin_Sr: Tensor

    def at(self, positions_BS: Tensor) -> "Rotation":
        """Of the same table, the angles at these positions: [B, 1, S, r]."""
        return Rotation(self.cos_Sr[positions_BS].unsqueeze(1), self.sin_Sr[positions_BS].unsqueeze(1))

    def apply(self, x_BHSd: Tensor) -> Tensor:
        """Rotate the first r of queries or keys [B, H, S, d]; dtype kept."""
        width = self.cos_Sr.shape[-1]
        rotated, rest = x_BHSd[..., :width], x_BHSd[..., width:]
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        rotated = rotated * self.cos_Sr.to(x_BHSd.dtype) + turned * self.sin_Sr.to(x_BHSd.dtype)
        return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def rotation(
    length: int, width: int, theta: float, device: torch.device, scaling: RopeScaling | None = None
) -> Rotation:
    """Angles position * theta^(-2i/r) for positions 0 to length - 1, and `width` r."""
    pairs = torch.arange(0, width, 2, dtype=torch.int64, device=device).float()
    frequency_p = 1.0 / (theta ** (pairs / width))
    if scaling is not None:
        frequency_p = _stretched(frequency_p, width, theta, scaling, length)
    position_S = torch.arange(length, device=device).float()
    angle_Sr = torch.outer(position_S, frequency_p).repeat(1, 2)
    factor = attention_factor(scaling, length)
    return Rotation(angle_Sr.cos() * factor, angle_Sr.sin() * factor)


def attention_factor(scaling: RopeScaling | None, length: int) -> float:
    """What yarn (arXiv:2309.00071, section 3.4) and longrope multiply cosine and sine by; 1 without them."""
    if scaling is not None and scaling.kind == "longrope":
        found = scaling.long_mscale if _is_long(scaling, length) else scaling.short_mscale
        assert found is not None, "checked by moe.config.shape"
        return found
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return _grown(scaling.factor, scaling.mscale) / _grown(scaling.factor, scaling.mscale_all_dim)
    return _grown(scaling.factor, 1.0)


def logit_factor(scaling: RopeScaling | None) -> float:
    """What latent attention's logits are multiplied by besides (DeepSeek-V2's code); 1 without mscale_all_dim."""
    if scaling is None or scaling.mscale_all_dim is None:
        return 1.0
    return _grown(scaling.factor, scaling.mscale_all_dim) ** 2


def _grown(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _is_long(scaling: RopeScaling, length: int) -> bool:
    assert scaling.original_max_sequence_length is not None, "checked by moe.config.shape"
    return length > scaling.original_max_sequence_length


def _stretched(frequency_p: Tensor, width: int, theta: float, scaling: RopeScaling, length: int) -> Tensor:
    if scaling.kind == "longrope":
        factors = scaling.long_factors if _is_long(scaling, length) else scaling.short_factors
        return frequency_p / torch.tensor(factors, device=frequency_p.device)
    if scaling.kind == "linear":
        return frequency_p / scaling.factor
    assert scaling.original_max_sequence_length is not None, "checked by moe.config.shape"
    if scaling.kind == "yarn":
        return _yarn(frequency_p, width, theta, scaling, scaling.original_max_sequence_length)
    return _llama3(frequency_p, scaling, scaling.original_max_sequence_length)


def _llama3(frequency_p: Tensor, scaling: RopeScaling, original: int) -> Tensor:
    """Short waves stay, long ones are divided, those between are mixed (Llama 3.1's code)."""
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    assert low is not None, "checked by moe.config.shape"
    assert high is not None, "checked by moe.config.shape"
    wave_p = 2 * math.pi / frequency_p
    kept_p = ((original / wave_p - low) / (high - low)).clamp(0, 1)
    return (1 - kept_p) * frequency_p / scaling.factor + kept_p * frequency_p


def _yarn(frequency_p: Tensor, width: int, theta: float, scaling: RopeScaling, original: int) -> Tensor:
    """Pairs that turn often stay, those that turn less than once are divided (arXiv:2309.00071, section 3.2)."""

    def pair(rotations: float) -> float:
        """The pair that turns so often within the original length."""
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast or 32.0), pair(scaling.beta_slow or 1.0)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    index_p = torch.arange(len(frequency_p), dtype=torch.float32, device=frequency_p.device)
    divided_p = ((index_p - low) / ((high - low) or 0.001)).clamp(0, 1)
    return frequency_p / scaling.factor * divided_p + frequency_p * (1 - divided_p)
