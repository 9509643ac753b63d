"""Tokens -> scores -> the experts that each token visits, and with what weight.

T tokens, D width, E experts, K choices, G groups of experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe.config import MoEConfig
from moe.sparse import choice
from moe.sparse.copies import count
from moe.sparse.jitter import Jitter
from moe.sparse.product import Products


class RoutingRecord(NamedTuple):
    """What balancing policies and metrics need of a layer's routing; a tuple for the sake of DeepSpeed's hooks."""

    ids_TK: Tensor
    """int64: chosen experts; where experts choose, with filler that `counts_E` leaves out."""
    probabilities_TE: Tensor
    """float32: scores that add up to 1 for each token, with gradient."""
    log_sum_exp_T: Tensor
    """float32: log of the sum of exponentiated logits, with gradient."""
    counts_E: Tensor
    """int64: choices of unmasked tokens on this rank, dropped ones included."""
    num_dropped: Tensor
    """int64 scalar: choices of unmasked tokens that found their expert full."""
    logits_TE: Tensor
    """float32, without gradient."""


@dataclass(frozen=True)
class Routing:
    """Where each token goes."""

    ids_TK: Tensor
    """int64: chosen experts, all different for a token."""
    kept_TK: Tensor | None
    """bool: choices that count, of unmasked tokens and, where experts choose, those they made; None: all."""
    weights_TK: Tensor
    """float32: how much each chosen expert counts; 0 for choices that do not."""
    probabilities_TE: Tensor
    log_sum_exp_T: Tensor
    counts_E: Tensor
    logits_TE: Tensor

    def record(self, num_dropped: Tensor) -> RoutingRecord:
        return RoutingRecord(
            self.ids_TK,
            self.probabilities_TE,
            self.log_sum_exp_T,
            self.counts_E,
            num_dropped,
            self.logits_TE,
        )


class Router(nn.Module):
    """Scores, a choice of K, and their weights, all in float32 or wider.

    The choice sees scores plus the selection bias, within the allowed groups; weights come from the scores alone
    (arXiv:2412.19437, eq. 12-16; softmax: arXiv:2006.16668, eq. 1-3). Top 1 with the raw softmax score is Switch
    (arXiv:2101.03961, eq. 1-2). Softmax scores of the chosen, divided by their sum, are the softmax over the
    chosen logits (Mixtral, arXiv:2401.04088, section 2.1; GPT-OSS), whatever the groups, the bias and the scale:
    there is no separate option for it.
    """

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.router_bias else None
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.selection_bias else None
        self.selection_bias_E: Tensor | None
        self.register_buffer("selection_bias_E", bias)

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, jitter: Jitter | None = None) -> Routing:
        """Route [T, D]; tokens whose `mask_T` (bool) is False get weight 0 and are not counted.

        `jitter` is multiplied into what is routed, here alone: experts see x as it is.
        """
        if jitter is not None:
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            x_TD = x_TD.to(wide) * jitter.factors(x_TD.shape[1], wide)
        # Outside any autocast: rounding a logit to bf16 changes choices, not only weights.
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE: Tensor = _Logits.apply(x_TD, self.weight)
            if self.bias is not None:
                logits_TE = logits_TE + self.bias.to(logits_TE.dtype)
            scores_TE, probabilities_TE = self._scores(logits_TE)
        ids_TK, kept_TK = self._choose(scores_TE, mask_T)
        weights_TK = self._weigh(logits_TE, scores_TE, ids_TK) * self.config.route_scale
        if kept_TK is not None:
            weights_TK = weights_TK * kept_TK
        return Routing(
            ids_TK=ids_TK,
            kept_TK=kept_TK,
            weights_TK=weights_TK,
            probabilities_TE=probabilities_TE,
            log_sum_exp_T=torch.logsumexp(logits_TE, dim=-1),
            counts_E=count_choices(ids_TK, kept_TK, self.config.num_experts),
            logits_TE=logits_TE.detach(),
        )

    def _scores(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(scores, the same as probabilities)."""
        if self.config.router_score != "sigmoid":
            scores_TE = torch.softmax(logits_TE, dim=-1)
            return scores_TE, scores_TE
        scores_TE = torch.sigmoid(logits_TE)
        return scores_TE, scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)

    def _choose(self, scores_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """int64 [T, K] and which of them count, without gradient."""
        config = self.config
        if config.router_choice == "expert":
            return choice.by_experts(scores_TE, mask_T, config.top_k)
        if config.router_choice == "round_robin":
            ids_TK = choice.in_turn(scores_TE.detach(), mask_T, config.top_k)
        else:
            ids_TK = self._best(scores_TE)
        return ids_TK, None if mask_T is None else mask_T.unsqueeze(-1).expand_as(ids_TK)

    def _best(self, scores_TE: Tensor) -> Tensor:
        """int64 [T, K]: each token's own choice."""
        preference_TE = scores_TE.detach()
        if self.selection_bias_E is not None:
            preference_TE = preference_TE + self.selection_bias_E
        if self.config.num_expert_groups is not None and self.config.top_k_groups is not None:
            preference_TE = _within_best_groups(
                preference_TE,
                self.config.num_expert_groups,
                self.config.top_k_groups,
                self.config.group_score,
            )
        return torch.topk(preference_TE, self.config.top_k, dim=-1).indices

    def _weigh(self, logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """The chosen scores, divided by their sum if so configured."""
        if self.config.router_score == "sparsemixer":
            assert self.config.sparsemixer_margin is not None, "checked by moe.config.shape"
            return sparsemixer(logits_TE, ids_TK, self.config.sparsemixer_margin)
        if not self.config.normalize_top_k:
            return scores_TE.gather(1, ids_TK)
        if self.config.router_score == "softmax":
            # The quotient itself, but a bias may choose experts whose probabilities all underflow to 0.
            return torch.softmax(logits_TE.gather(1, ids_TK), dim=-1)
        weights_TK = scores_TE.gather(1, ids_TK)
        return weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Follow `.to(...)` and the like, but for the bias's dtype.

        Once |bias| >= 0.5 a step of 1e-3 vanishes in bf16 (eight bits of mantissa).
        """
        before = self.selection_bias_E
        super()._apply(fn, recurse)
        after = self.selection_bias_E
        if before is not None and after is not None:
            # From the meta device, as `to_empty` comes, there is nothing to keep but the dtype.
            self.selection_bias_E = after.to(before.dtype) if before.is_meta else before.to(after.device)
        return self


def sparsemixer(logits_TE: Tensor, ids_TK: Tensor, margin: float) -> Tensor:
    """Weights [T, K] of choices in order: each a softmax over the experts not chosen before it whose logits are within
    twice the relative `margin` of the best of these (arXiv:2409.12136; Phi-3.5-MoE's code, without its sampling).
    """
    left_TE, weights = logits_TE, []
    for ids_T1 in ids_TK.split(1, dim=-1):
        with torch.no_grad():
            best_T1 = left_TE.amax(dim=-1, keepdim=True)
            far_TE = (best_T1 - logits_TE) / logits_TE.abs().clamp(min=best_T1) > 2 * margin
        near_TE = torch.softmax(left_TE.masked_fill(far_TE, float("-inf")), dim=-1)
        weights.append(near_TE.gather(1, ids_T1))
        left_TE = left_TE.scatter(-1, ids_T1, float("-inf"))
    return torch.cat(weights, dim=-1)


def _within_best_groups(preference_TE: Tensor, num_groups: int, top_groups: int, score: str) -> Tensor:
    """Preferences with those outside each token's best groups at minus infinity (arXiv:2412.19437, section 2.1.2)."""
    grouped_TGe = preference_TE.unflatten(-1, (num_groups, -1))
    best = 1 if score == "max" else 2
    group_score_TG = grouped_TGe.topk(best, dim=-1).values.sum(-1)
    chosen = group_score_TG.topk(top_groups, dim=-1).indices
    allowed_TG = torch.zeros_like(group_score_TG, dtype=torch.bool).scatter_(1, chosen, True)
    limited_TGe: Tensor = grouped_TGe.masked_fill(~allowed_TG.unsqueeze(-1), float("-inf"))
    return limited_TGe.flatten(1)


def count_choices(ids_TK: Tensor, kept: Tensor | None, num_experts: int) -> Tensor:
    """int64 [E]: how many choices fell on each expert; `kept` (bool, [T] or [T, K]) says which count."""
    if kept is not None:
        kept_TK = kept if kept.ndim == ids_TK.ndim else kept.unsqueeze(-1)
        ids_TK = torch.where(kept_TK, ids_TK, num_experts)  # behind all others
    return count(ids_TK, num_experts + 1)[:num_experts]


class _Logits(torch.autograd.Function):
    """x W^T in float32 or wider; of x only the narrow form is kept, which the layer keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad
        ctx.save_for_backward(x_TD if needs_weight else None, weight_ED if needs_x else None)
        ctx.dtypes = x_TD.dtype, weight_ED.dtype
        wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        ctx.products = Products.of(wide_TD, len(wide_TD), weight_ED)
        logits_TE: Tensor = ctx.products.multiply(wide_TD, weight_ED.to(wide_TD.dtype).t())
        return logits_TE

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        products: Products = ctx.products.for_backward()
        dtype, weight_dtype = ctx.dtypes
        grad_x_TD = grad_weight_ED = None
        if weight_ED is not None:
            grad_x_TD = products.multiply(grad_TE, weight_ED.to(grad_TE.dtype)).to(dtype)
        if x_TD is not None:
            grad_weight_ED = products.multiply(grad_TE.t(), x_TD.to(grad_TE.dtype)).to(weight_dtype)
        return grad_x_TD, grad_weight_ED
