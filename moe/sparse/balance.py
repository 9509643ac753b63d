"""Routing records -> balancing losses and load metrics; pure functions, every layer on its own statistics.

B sequences, S tokens in a sequence, T = B S tokens, E experts, K choices.
"""

import torch
from torch import Tensor

from moe.sparse.router import RoutingRecord


def sequence_balance(record: RoutingRecord, mask_BS: Tensor) -> Tensor:
    """Sum over sequences of E sum_i f_i P_i (arXiv:2101.03961, eq. 4, within a sequence as in arXiv:2405.04434).

    f_i: share of the sequence's choices that fell on expert i; P_i: mean probability of expert i in it.
    A scalar with gradient; each sequence is 1 when balanced and up to E when collapsed. A sequence that is
    masked throughout adds 0.
    """
    num_experts = record.scores_TE.shape[1]
    batch, length = mask_BS.shape
    mask_BS1 = mask_BS.unsqueeze(-1).to(record.scores_TE.dtype)
    chosen_BSE = torch.zeros_like(record.scores_TE).scatter_(1, record.ids_TK, 1.0).view(batch, length, -1)
    tokens_B1 = mask_BS1.sum(1).clamp(min=1)
    fraction_BE = (chosen_BSE * mask_BS1).sum(1) / (tokens_B1 * record.ids_TK.shape[1])
    probability_BE = (record.scores_TE.view(batch, length, -1) * mask_BS1).sum(1) / tokens_B1
    return num_experts * (fraction_BE * probability_BE).sum()


def global_balance(
    record: RoutingRecord, mask_T: Tensor, global_counts_E: Tensor, num_tokens: Tensor
) -> Tensor:
    """This rank's and micro-batch's share of E sum_i f_i P_i over the global batch (arXiv:2501.11873, eq. 4).

    `global_counts_E` (int64) and `num_tokens` are those of the whole batch; shares of all ranks and
    micro-batches add up to the loss, and so do their gradients.
    """
    num_experts, num_choices = record.scores_TE.shape[1], record.ids_TK.shape[1]
    fraction_E = global_counts_E.to(record.scores_TE.dtype) / (num_tokens * num_choices)
    probability_E = record.scores_TE.mul(mask_T.unsqueeze(-1)).sum(0) / num_tokens
    return num_experts * (fraction_E * probability_E).sum()


def z_loss(record: RoutingRecord, mask_T: Tensor) -> Tensor:
    """Sum over tokens of (log sum_i exp logit_i)^2 (arXiv:2202.08906, eq. 5, before its mean)."""
    return record.log_sum_exp_T.square().mul(mask_T).sum()


def max_violation(counts_LE: Tensor) -> Tensor:
    """[L]: largest load of a layer over its mean load, minus 1; 0 is balance (arXiv:2408.15664, eq. 4)."""
    counts = counts_LE.double()
    return counts.max(dim=1).values / counts.mean(dim=1).clamp(min=1e-9) - 1
