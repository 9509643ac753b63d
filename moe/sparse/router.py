"""Tokens -> scores -> the experts that each token visits, and with what weight.

T tokens, D width, E experts, K choices.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import MoEConfig


@dataclass(frozen=True)
class RoutingRecord:
    """What balancing losses and metrics need of a layer's routing."""

    ids_TK: Tensor
    """int64: chosen experts."""
    scores_TE: Tensor
    """float32: router probabilities, with gradient."""
    log_sum_exp_T: Tensor
    """float32: log of the sum of exponentiated logits, with gradient."""
    counts_E: Tensor
    """int64: choices of unmasked tokens on this rank."""


@dataclass(frozen=True)
class Routing:
    """Where each token goes."""

    ids_TK: Tensor
    """int64: chosen experts, all different for a token."""
    weights_TK: Tensor
    """float32: how much each chosen expert counts; 0 for masked tokens."""
    scores_TE: Tensor
    log_sum_exp_T: Tensor
    counts_E: Tensor

    def record(self) -> RoutingRecord:
        return RoutingRecord(self.ids_TK, self.scores_TE, self.log_sum_exp_T, self.counts_E)


class Router(nn.Module):
    """Softmax over all experts, then the K best (arXiv:2006.16668, eq. 1-3), in float32 or wider."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.normalize = config.normalize_top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None) -> Routing:
        """Route [T, D]; tokens whose `mask_T` (bool) is False get weight 0 and are not counted."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        # Outside any autocast: rounding a logit to bf16 changes choices, not only weights.
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
            scores_TE = torch.softmax(logits_TE, dim=-1)
        weights_TK, ids_TK = torch.topk(scores_TE, self.top_k, dim=-1)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        if mask_T is not None:
            weights_TK = weights_TK * mask_T.unsqueeze(-1)
        return Routing(
            ids_TK=ids_TK,
            weights_TK=weights_TK,
            scores_TE=scores_TE,
            log_sum_exp_T=torch.logsumexp(logits_TE, dim=-1),
            counts_E=count_choices(ids_TK, mask_T, self.weight.shape[0]),
        )


def count_choices(ids_TK: Tensor, mask_T: Tensor | None, num_experts: int) -> Tensor:
    """int64 [E]: how many unmasked tokens chose each expert."""
    kept = ids_TK if mask_T is None else ids_TK[mask_T]
    return torch.bincount(kept.reshape(-1), minlength=num_experts)
