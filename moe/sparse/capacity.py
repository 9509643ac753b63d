"""Choices and weights -> the choices that full experts still accept; integers and a sort, no gradient.

T tokens, K choices, E experts, N = T K.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.config import BalanceConfig


@dataclass(frozen=True)
class Capacity:
    """How many rows an expert accepts from a rank's micro-batch, and which ones it drops."""

    factor: float
    drop_by: Literal["score", "position"]

    @classmethod
    def of(cls, balance: BalanceConfig) -> "Capacity | None":
        """What a recipe asks for; None: dropless."""
        return None if balance.capacity_factor is None else cls(balance.capacity_factor, balance.drop_by)

    def rows(self, num_tokens: int, top_k: int, num_experts: int) -> int:
        """ceil(factor T K / E) (arXiv:2006.16668, section 2.2), at least 1."""
        return max(1, math.ceil(self.factor * num_tokens * top_k / num_experts))


@torch.no_grad()
def accepted(
    ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, capacity: Capacity, num_experts: int
) -> Tensor:
    """Bool [T, K]: of the choices in `kept_TK` (unmasked tokens), those within their expert's capacity.

    By score the highest weights stay, ties by position; by position the first tokens stay.
    """
    num_tokens = int(kept_TK.any(dim=1).sum())
    limit = capacity.rows(num_tokens, ids_TK.shape[1], num_experts)
    ids_N, kept_N = ids_TK.reshape(-1), kept_TK.reshape(-1)
    order_N = torch.arange(ids_N.numel(), device=ids_N.device)
    if capacity.drop_by == "score":
        order_N = torch.argsort(weights_TK.reshape(-1), descending=True, stable=True)
    # Those that do not count go to an expert of their own, behind all others.
    expert_N = torch.where(kept_N, ids_N, num_experts)[order_N]
    by_expert_N = torch.argsort(expert_N, stable=True)
    counts = torch.bincount(expert_N, minlength=num_experts + 1)
    starts = counts.cumsum(0) - counts
    sorted_experts_N = expert_N[by_expert_N]
    place_N = torch.arange(ids_N.numel(), device=ids_N.device) - starts[sorted_experts_N]
    stays_N = (place_N < limit) & (sorted_experts_N < num_experts)
    accepted_N = torch.empty_like(kept_N)
    accepted_N[order_N[by_expert_N]] = stays_N
    return accepted_N.view(ids_TK.shape)
