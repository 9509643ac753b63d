"""Routing records -> balancing losses and load metrics; pure functions, every layer on its own statistics.

B sequences, S tokens in a sequence, T = B S tokens, E experts, K choices.
"""

import torch
from torch import Tensor

from moe.sparse.router import RoutingRecord


def choices(record: RoutingRecord, mask_BS: Tensor) -> Tensor:
    """int64 [B, E]: choices of each expert by the unmasked tokens of each sequence."""
    chosen_TE = torch.zeros_like(record.probabilities_TE).scatter_(1, record.ids_TK, 1.0)
    chosen_BSE = chosen_TE.view(*mask_BS.shape, -1)
    return (chosen_BSE * mask_BS.unsqueeze(-1)).sum(1).long()


def sequence_balance(record: RoutingRecord, mask_BS: Tensor, choices_BE: Tensor | None = None) -> Tensor:
    """Sum over sequences of E sum_i f_i P_i (arXiv:2101.03961, eq. 4, within a sequence as in arXiv:2405.04434).

    f_i: share of the sequence's choices that fell on expert i; P_i: mean probability of expert i in it.
    A scalar with gradient; each sequence is 1 when balanced and up to E when collapsed. A sequence that is
    masked throughout adds 0. `choices_BE` (int64) are those of the whole sequences where only some of their
    positions are here: P is a sum over positions, so the shares of ranks add up to the loss.
    """
    num_experts, num_choices = record.probabilities_TE.shape[1], record.ids_TK.shape[1]
    mask_BS1 = mask_BS.unsqueeze(-1).to(record.probabilities_TE.dtype)
    choices_BE = choices(record, mask_BS) if choices_BE is None else choices_BE
    # Each unmasked token makes K choices: the sequence's length is among what is known of it.
    choices_B1 = choices_BE.sum(1, keepdim=True).clamp(min=num_choices).to(mask_BS1.dtype)
    fraction_BE = choices_BE / choices_B1
    tokens_B1 = choices_B1 / num_choices
    probability_BE = (record.probabilities_TE.view(*mask_BS.shape, -1) * mask_BS1).sum(1) / tokens_B1
    return num_experts * (fraction_BE * probability_BE).sum()


def global_balance(
    record: RoutingRecord, mask_T: Tensor, global_counts_E: Tensor, num_tokens: Tensor
) -> Tensor:
    """This rank's and micro-batch's share of E sum_i f_i P_i over the global batch (arXiv:2501.11873, eq. 4).

    `global_counts_E` (int64) and `num_tokens` are those of the whole batch; shares of all ranks and
    micro-batches add up to the loss, and so do their gradients.
    """
    num_experts, num_choices = record.probabilities_TE.shape[1], record.ids_TK.shape[1]
    fraction_E = global_counts_E.to(record.probabilities_TE.dtype) / (num_tokens * num_choices)
    probability_E = record.probabilities_TE.mul(mask_T.unsqueeze(-1)).sum(0) / num_tokens
    return num_experts * (fraction_E * probability_E).sum()


def micro_batch_balance(record: RoutingRecord, mask_T: Tensor, counts_E: Tensor | None = None) -> Tensor:
    """E sum_i f_i P_i over this rank's micro-batch (arXiv:2101.03961, eq. 4); 0 if all of it is masked.

    `counts_E` (int64) are its choices where only some positions of its sequences are here; shares of ranks add up.
    """
    counts_E = record.counts_E if counts_E is None else counts_E
    num_tokens = counts_E.sum() / record.ids_TK.shape[1]
    return global_balance(record, mask_T, counts_E, num_tokens.clamp(min=1))


def bias_step(counts_E: Tensor, rate: float, rule: str) -> Tensor:
    """What to add to an expert's selection bias: up if it had less than the mean load, down if more.

    `counts_E`: int64 [..., E], exact over the global batch. sign: rate * sign(mean - load) (arXiv:2408.15664,
    alg. 1); proportional: rate * (mean - load) / mean. float32; 0 where a layer had no tokens.
    """
    load_E = counts_E.double()
    violation_E = load_E.mean(dim=-1, keepdim=True) - load_E
    if rule == "proportional":
        violation_E = violation_E / load_E.mean(dim=-1, keepdim=True).clamp(min=1e-9)
    else:
        violation_E = violation_E.sign()
    return (rate * violation_E).float()


def z_loss(record: RoutingRecord, mask_T: Tensor) -> Tensor:
    """Sum over tokens of (log sum_i exp logit_i)^2 (arXiv:2202.08906, eq. 5, before its mean)."""
    return record.log_sum_exp_T.square().mul(mask_T).sum()


def max_violation(counts_LE: Tensor) -> Tensor:
    """[L]: largest load of a layer over its mean load, minus 1; 0 is balance (arXiv:2408.15664, eq. 4)."""
    counts = counts_LE.double()
    return counts.max(dim=1).values / counts.mean(dim=1).clamp(min=1e-9) - 1
