"""A CPU's abilities -> the dtype in which products of bf16 are computed: bf16 itself needs units for it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_BF16_UNITS = ("avx512_bf16", "avx10_2", "amx_bf16", "bf16", "sve_bf16")
"""Names of `torch.cpu.get_capabilities`: of x86, the last two of ARM."""


def product_dtype(like: Tensor) -> torch.dtype:
    """In what products of tensors `like` this one are to be computed where it lies."""
    if like.dtype != torch.bfloat16 or like.device.type != "cpu":
        return like.dtype
    return torch.bfloat16 if has_bf16_units(torch.cpu.get_capabilities()) else torch.float32


def has_bf16_units(capabilities: Mapping[str, Any]) -> bool:
    """Without them a product in bf16 takes several times as long as one in float32 with all conversions."""
    return any(capabilities.get(name, False) for name in _BF16_UNITS)
