"""Model outputs -> this micro-batch's share of the global batch's loss; nothing is left on a module."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config import BalanceConfig
from moe.model import ModelOutput
from moe.sparse import RoutingRecord, balance


@dataclass(frozen=True)
class Totals:
    """What the shares are shares of: the whole global batch, over ranks and micro-batches."""

    num_tokens: Tensor
    """Unmasked tokens; float scalar."""
    num_sequences: Tensor
    """Sequences with an unmasked token; float scalar."""
    num_micro_batches: int
    """Over all ranks; ranks that share sequences have one together."""
    counts_LE: Tensor | None = None
    """int64: choices per sparse layer and expert; needed by the global-batch loss alone."""
    num_predictions: Tensor | None = None
    """Tokens that count in the cross-entropy; float scalar; None: all that are unmasked."""


@dataclass(frozen=True)
class Losses:
    """Shares that add up, over ranks and micro-batches, to the means over the global batch."""

    total: Tensor
    """What is differentiated: cross-entropy, and weighted, the loss of prediction modules and the balancing losses
    summed over layers."""
    cross_entropy: Tensor
    """Nats per token that is predicted."""
    load_balancing: Tensor
    """Mean over sparse layers of the loss with the widest scope in use, unweighted; 1 is balance."""
    router_z: Tensor
    """Mean over sparse layers, unweighted."""
    further: Tensor
    """Nats per token of the prediction modules, the mean over modules, unweighted; 0 without them."""

    def terms(self) -> Tensor:
        """[5]: cross-entropy, load balancing, router z, further and total, without gradient."""
        parts = (self.cross_entropy, self.load_balancing, self.router_z, self.further, self.total.detach())
        return torch.stack(parts)


def losses(
    output: ModelOutput,
    mask_BS: Tensor,
    totals: Totals,
    config: BalanceConfig,
    choices_LBE: Tensor | None = None,
    prediction_weight: float = 0.0,
) -> Losses:
    """Combine a micro-batch's cross-entropy and per-layer balancing losses. `mask_BS`: bool.

    `choices_LBE` are `choices` of the whole sequences where only some of their positions are here.
    `prediction_weight` is that of the prediction modules' mean loss (arXiv:2412.19437, eq. 25).
    """
    predictions = totals.num_tokens if totals.num_predictions is None else totals.num_predictions
    cross_entropy = output.cross_entropy / predictions
    total, nothing = cross_entropy, torch.zeros_like(cross_entropy).detach()
    further = nothing
    if output.further is not None:
        further = output.further / predictions
        total = total + prediction_weight * further
    further = further.detach()
    if not output.records:
        return Losses(total, cross_entropy.detach(), nothing, nothing, further)
    mask_T = mask_BS.flatten()
    router_z = torch.stack([balance.z_loss(r, mask_T) / totals.num_tokens for r in output.records])
    total = total + config.router_z_loss_weight * router_z.sum()
    load_balancing = torch.zeros_like(router_z).detach()
    for weight, per_layer in _scopes(output.records, mask_BS, totals, config, choices_LBE):
        load_balancing = per_layer
        total = total + weight * per_layer.sum()
    return Losses(
        total, cross_entropy.detach(), load_balancing.detach().mean(), router_z.detach().mean(), further
    )


def _scopes(
    records: Sequence[RoutingRecord],
    mask_BS: Tensor,
    totals: Totals,
    config: BalanceConfig,
    choices_LBE: Tensor | None,
) -> list[tuple[float, Tensor]]:
    """(weight, loss of each layer) for the scopes in use, narrow to wide."""
    found, mask_T = [], mask_BS.flatten()
    by_layer: list[Tensor | None] = [None] * len(records) if choices_LBE is None else list(choices_LBE)
    here = list(zip(records, by_layer, strict=True))
    if config.sequence_loss_weight:
        shares = [balance.sequence_balance(r, mask_BS, c_BE) / totals.num_sequences for r, c_BE in here]
        found.append((config.sequence_loss_weight, torch.stack(shares)))
    if config.micro_batch_loss_weight:
        counts = [(r, None if c_BE is None else c_BE.sum(0)) for r, c_BE in here]
        shares = [balance.micro_batch_balance(r, mask_T, c_E) / totals.num_micro_batches for r, c_E in counts]
        found.append((config.micro_batch_loss_weight, torch.stack(shares)))
    if config.global_batch_loss_weight:
        assert totals.counts_LE is not None
        pairs = zip(records, totals.counts_LE, strict=True)
        shares = [balance.global_balance(r, mask_T, counts_E, totals.num_tokens) for r, counts_E in pairs]
        found.append((config.global_batch_loss_weight, torch.stack(shares)))
    return found


def choices(output: ModelOutput, mask_BS: Tensor) -> Tensor:
    """int64 [L, B, E]: choices of each sparse layer's experts by the unmasked tokens of each sequence."""
    return torch.stack([balance.choices(record, mask_BS) for record in output.records])


def local_load(output: ModelOutput) -> Tensor | None:
    """int64 [L, E + 1]: choices of each expert on this rank, and in the last column those that were dropped.

    None for a dense model.
    """
    if not output.records:
        return None
    return torch.stack([torch.cat([r.counts_E, r.num_dropped.view(1)]) for r in output.records])
