"""Model outputs -> this micro-batch's share of the global batch's loss; nothing is left on a module."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config import BalanceConfig
from moe.model import ModelOutput
from moe.sparse import balance


@dataclass(frozen=True)
class Totals:
    """What the shares are shares of: the whole global batch, over ranks and micro-batches."""

    num_tokens: Tensor
    """Unmasked tokens; float scalar."""
    num_sequences: Tensor
    """Sequences with an unmasked token; float scalar."""
    counts_LE: Tensor | None = None
    """int64: choices per sparse layer and expert; needed by the global-batch scope alone."""


@dataclass(frozen=True)
class Losses:
    """Shares that add up, over ranks and micro-batches, to the means over the global batch."""

    total: Tensor
    """What is differentiated: cross-entropy plus the weighted balancing losses, summed over layers."""
    cross_entropy: Tensor
    """Nats per token."""
    load_balancing: Tensor
    """Mean over sparse layers; 1 is balance."""
    router_z: Tensor
    """Mean over sparse layers."""


def losses(output: ModelOutput, mask_BS: Tensor, totals: Totals, config: BalanceConfig) -> Losses:
    """Combine a micro-batch's cross-entropy and per-layer balancing losses. `mask_BS`: bool."""
    cross_entropy = output.cross_entropy / totals.num_tokens
    if not output.records:
        nothing = torch.zeros_like(cross_entropy).detach()
        return Losses(cross_entropy, cross_entropy.detach(), nothing, nothing)
    mask_T = mask_BS.flatten()
    if config.load_balancing_scope == "sequence":
        per_layer = [balance.sequence_balance(r, mask_BS) / totals.num_sequences for r in output.records]
    else:
        assert totals.counts_LE is not None
        per_layer = [
            balance.global_balance(r, mask_T, counts_E, totals.num_tokens)
            for r, counts_E in zip(output.records, totals.counts_LE, strict=True)
        ]
    load_balancing = torch.stack(per_layer)
    router_z = torch.stack([balance.z_loss(r, mask_T) / totals.num_tokens for r in output.records])
    total = (
        cross_entropy
        + config.load_balancing_weight * load_balancing.sum()
        + config.router_z_loss_weight * router_z.sum()
    )
    return Losses(total, cross_entropy.detach(), load_balancing.detach().mean(), router_z.detach().mean())


def local_counts(outputs: Sequence[ModelOutput]) -> Tensor | None:
    """int64 [L, E]: choices on this rank, summed over micro-batches; None for a dense model."""
    if not outputs or not outputs[0].records:
        return None
    return torch.stack([torch.stack([r.counts_E for r in output.records]) for output in outputs]).sum(0)
