"""Routing records -> how each sparse layer fares: entropies, logits, experts without tokens. Nothing is read here.

L sparse layers, T tokens, E experts. Masked tokens count nowhere; no gradient flows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.sparse.router import RoutingRecord

DEAD_AFTER_STEPS = 100
"""Steps without a token, in the whole global batch, after which an expert is called dead."""


@dataclass(frozen=True)
class Sample:
    """What is seen of a micro-batch on a rank, so that samples of ranks and micro-batches can be joined."""

    sums_LM: Tensor
    """float64 [L, E + 2], over tokens: each expert's probability, entropy (nats), squared logits of all experts."""
    maxima_L2: Tensor
    """float64 [L, 2], over tokens: largest |logit|, largest log-sum-exp."""

    def joined(self, other: "Sample | None") -> "Sample":
        """Both as one."""
        if other is None:
            return self
        return Sample(self.sums_LM + other.sums_LM, torch.maximum(self.maxima_L2, other.maxima_L2))


@dataclass(frozen=True)
class Health:
    """Of each sparse layer over a global batch, as it was routed; each float [L]."""

    token_entropy: Tensor
    """Mean over tokens of the entropy of a token's probabilities; 1: undecided, 0: certain."""
    router_entropy: Tensor
    """Entropy of the probabilities' mean over tokens; 1: all experts alike, 0: one expert."""
    logit_rms: Tensor
    """Root mean square of the router's logits, over tokens and experts."""
    logit_max: Tensor
    """Largest |logit|."""
    log_sum_exp_max: Tensor
    """Largest log of a token's summed exponentiated logits; what the router z-loss pulls to zero."""
    bias_min: Tensor | None = None
    """Smallest selection bias of the experts; None without one."""
    bias_max: Tensor | None = None


@torch.no_grad()
def observe(records: Sequence[RoutingRecord], mask_T: Tensor) -> Sample:
    """See each layer's `RoutingRecord`; `mask_T`: bool, the same for all."""
    masked_T = ~mask_T
    seen = [_observe(record, masked_T) for record in records]
    return Sample(torch.stack([sums for sums, _ in seen]), torch.stack([maxima for _, maxima in seen]))


def _observe(record: RoutingRecord, masked_T: Tensor) -> tuple[Tensor, Tensor]:
    probabilities_TE = record.probabilities_TE.masked_fill(masked_T.unsqueeze(-1), 0)
    logits_TE = record.logits_TE.masked_fill(masked_T.unsqueeze(-1), 0)
    per_token_2T = torch.stack([torch.special.entr(probabilities_TE).sum(-1), logits_TE.square().sum(-1)])
    largest = logits_TE.abs().amax()
    log_sum_exp = record.log_sum_exp_T.masked_fill(masked_T, float("-inf")).amax()
    wide = torch.float64
    sums = torch.cat([probabilities_TE.sum(0, dtype=wide), per_token_2T.sum(1, dtype=wide)])
    return sums, torch.stack([largest, log_sum_exp]).to(wide)


@torch.no_grad()
def summarize(sample: Sample, num_tokens: Tensor, biases: Sequence[Tensor] = ()) -> Health:
    """What a global batch's joined sample says; `num_tokens`: its unmasked tokens, float scalar.

    Entropies are divided by log E. The entropy of a token and that of the mean are LIMoE's local and global
    entropy (arXiv:2206.02770, section 2.2); their difference is how much a token says about its expert. Large
    logits are what the z-loss is against (arXiv:2202.08906, section 3.3). `biases`: each layer's float [E].
    """
    num_tokens = num_tokens.clamp(min=1)
    num_experts = sample.sums_LM.shape[1] - 2
    probability_LE, entropy_L, squares_L = sample.sums_LM.split([num_experts, 1, 1], dim=1)
    logit_max_L, log_sum_exp_max_L = sample.maxima_L2.unbind(1)
    bias_LE = torch.stack(list(biases)) if biases else None
    return Health(
        token_entropy=_over_even(entropy_L.squeeze(1) / num_tokens, num_experts),
        router_entropy=normalized_entropy(probability_LE),
        logit_rms=(squares_L.squeeze(1) / (num_tokens * num_experts)).sqrt(),
        logit_max=logit_max_L,
        log_sum_exp_max=log_sum_exp_max_L,
        bias_min=bias_LE.amin(1) if bias_LE is not None else None,
        bias_max=bias_LE.amax(1) if bias_LE is not None else None,
    )


def normalized_entropy(weights_LE: Tensor) -> Tensor:
    """float64 [L]: -sum_i p_i log p_i / log E of each row over its sum (Shannon 1948, section 6).

    1 if all weights are equal, and by convention for one expert; 0 if one has all, or there is none.
    """
    weights_LE = weights_LE.double()
    share_LE = weights_LE / weights_LE.sum(1, keepdim=True).clamp(min=1e-300)
    return _over_even(torch.special.entr(share_LE).sum(1), weights_LE.shape[1])


def steps_since_use(before_LE: Tensor | None, counts_LE: Tensor) -> Tensor:
    """int64 [L, E]: steps that each expert has gone without a token, after a step with the global `counts_LE`.

    `before_LE`: the same before that step; None at the beginning. 0: it had one in this step.
    """
    before_LE = torch.zeros_like(counts_LE) if before_LE is None else before_LE
    return torch.where(counts_LE > 0, 0, before_LE + 1)


def dead_experts(steps_since_use_LE: Tensor, after: int = DEAD_AFTER_STEPS) -> Tensor:
    """int64 [L]: experts without a token in the last `after` steps.

    One step says little where a batch is small, so a window counts, as for the dead latents of sparse
    autoencoders (arXiv:2406.04093). One token brings an expert back to life.
    """
    return (steps_since_use_LE >= after).sum(1)


def _over_even(entropy_L: Tensor, num_experts: int) -> Tensor:
    """Entropy over that of an even distribution."""
    return entropy_L / math.log(num_experts) if num_experts > 1 else torch.ones_like(entropy_L)
