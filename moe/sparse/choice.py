"""Scores -> who visits whom where tokens do not choose for themselves; integers, no gradient.

T tokens, E experts, K choices of a token (on average, where experts choose), C tokens of an expert.
"""

import math

import torch
from torch import Tensor


@torch.no_grad()
def by_experts(scores_TE: Tensor, mask_T: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
    """Each expert takes its C = ceil(T K / E) best unmasked tokens, ties by position (arXiv:2202.09368, section 3.2).

    Returns every expert's id for every token, [T, E] (int64), and which of them count (bool): a token may have
    none, or all. The width is the same on every rank, as an exchange needs it. Whether an expert takes a token
    hangs on all tokens here, later ones of the same sequence too: a causal model trained so sees a little of the
    future.
    """
    num_tokens, num_experts = scores_TE.shape
    if mask_T is not None:
        num_tokens = int(mask_T.sum())
        scores_TE = scores_TE.masked_fill(~mask_T.unsqueeze(-1), float("-inf"))
    by_score_TE = torch.argsort(scores_TE, dim=0, descending=True, stable=True)
    chosen_CE = by_score_TE[: -(-num_tokens * top_k // num_experts)]
    taken_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(0, chosen_CE, True)
    return torch.arange(num_experts, device=scores_TE.device).expand_as(taken_TE), taken_TE


def in_turn(scores_TE: Tensor, mask_T: Tensor | None, top_k: int) -> Tensor:
    """int64 [T, K]: experts dealt like cards, so that loads of unmasked tokens differ by one at most.

    A stride without a common divisor with E spreads a token's experts over expert-parallel ranks, as a trained
    router does.
    """
    num_experts = scores_TE.shape[1]
    stride = next(s for s in range(num_experts // top_k, 2 * num_experts) if math.gcd(s, num_experts) == 1)
    if mask_T is None:
        mask_T = torch.ones_like(scores_TE[:, 0], dtype=torch.bool)
    token_T = (mask_T.cumsum(0) - 1).clamp_(min=0)
    card_TK = token_T.unsqueeze(-1) * top_k + torch.arange(top_k, device=token_T.device)
    return card_TK * stride % num_experts
