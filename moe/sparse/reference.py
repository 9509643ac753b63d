"""The sparse layer again: float64, one token at a time, nothing clever. What fast paths are compared with."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import MoEConfig
from moe.sparse.capacity import Capacity


@dataclass(frozen=True)
class ReferenceWeights:
    """All weights of a layer, all experts, float64 leaves."""

    router_ED: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    gate_up_bias_E2F: Tensor | None = None
    down_bias_ED: Tensor | None = None
    to_latent_LD: Tensor | None = None
    from_latent_DL: Tensor | None = None
    shared_gate_FD: Tensor | None = None
    shared_up_FD: Tensor | None = None
    shared_down_DF: Tensor | None = None
    shared_expert_gate_1D: Tensor | None = None


@dataclass(frozen=True)
class ReferenceOutput:
    """y [T, D]; the terms of the losses, each a scalar with gradient; counts int64 [E]."""

    y_TD: Tensor
    load_balancing_loss: Tensor
    """Over the whole batch."""
    z_loss: Tensor
    counts_E: Tensor
    num_dropped: int


@dataclass(frozen=True)
class _Choice:
    """What the router says of one token."""

    experts: list[int]
    weights: Tensor
    probabilities_E: Tensor
    log_sum_exp: Tensor


def sparse_layer(
    x_TD: Tensor,
    weights: ReferenceWeights,
    config: MoEConfig,
    *,
    mask_T: Tensor | None = None,
    selection_bias_E: Tensor | None = None,
    jitter_TD: Tensor | None = None,
    capacity: Capacity | None = None,
    micro_batches: int = 1,
) -> ReferenceOutput:
    """The layer's definition over the whole batch of T tokens, with the global-batch balancing loss.

    A capacity counts within each of the `micro_batches` equal parts of the batch; `jitter_TD` are factors on what
    the router sees. Raises `ValueError` unless every tensor is float64.
    """
    tensors = [x_TD, *(t for t in vars(weights).values() if t is not None)]
    if any(t.dtype != torch.float64 for t in tensors):
        raise ValueError("the reference is defined in float64: convert x and every weight with .double()")
    mask = [True] * len(x_TD) if mask_T is None else mask_T.tolist()
    seen_TD = x_TD if jitter_TD is None else x_TD * jitter_TD
    choices = [_route(x, weights.router_ED, config, selection_bias_E) for x in seen_TD]
    dropped = _dropped(choices, mask, config, capacity, micro_batches)
    outputs = []
    counts = torch.zeros(config.num_experts, dtype=torch.int64)
    for token, (x, choice) in enumerate(zip(x_TD, choices, strict=True)):
        y = _shared(x, weights)
        for place, expert in enumerate(choice.experts):
            if mask[token]:
                counts[expert] += 1
            if mask[token] and (token, expert) not in dropped:
                y = y + choice.weights[place] * _expert(x, weights, expert, config)
        outputs.append(y)
    kept = [choice for choice, counted in zip(choices, mask, strict=True) if counted]
    zero = x_TD.sum() * 0
    return ReferenceOutput(
        y_TD=torch.stack(outputs),
        load_balancing_loss=_balance(counts, [c.probabilities_E for c in kept], config.top_k)
        if kept
        else zero,
        z_loss=torch.stack([c.log_sum_exp**2 for c in kept]).mean() if kept else zero,
        counts_E=counts,
        num_dropped=len(dropped),
    )


def _route(x: Tensor, router_ED: Tensor, config: MoEConfig, bias_E: Tensor | None) -> _Choice:
    logits = router_ED @ x
    scores = torch.softmax(logits, 0) if config.router_score == "softmax" else torch.sigmoid(logits)
    preference = scores.detach() + (0 if bias_E is None else bias_E)
    allowed = _allowed(preference, config)
    ranked = sorted(allowed, key=lambda expert: -float(preference[expert]))
    experts = ranked[: config.top_k]
    weights = scores[experts]
    if config.normalize_top_k:
        weights = weights / weights.sum()
    return _Choice(experts, weights * config.route_scale, scores / scores.sum(), torch.logsumexp(logits, 0))


def _allowed(preference: Tensor, config: MoEConfig) -> list[int]:
    if config.num_expert_groups is None or config.top_k_groups is None:
        return list(range(config.num_experts))
    size = config.num_experts // config.num_expert_groups
    groups = [list(range(first, first + size)) for first in range(0, config.num_experts, size)]
    best = 1 if config.group_score == "max" else 2
    groups.sort(key=lambda group: -sum(sorted((float(preference[e]) for e in group), reverse=True)[:best]))
    return [expert for group in groups[: config.top_k_groups] for expert in group]


def _dropped(
    choices: list[_Choice], mask: list[bool], config: MoEConfig, capacity: Capacity | None, micro_batches: int
) -> set[tuple[int, int]]:
    """(token, expert) of choices that find their expert full."""
    dropped: set[tuple[int, int]] = set()
    size = len(choices) // micro_batches
    for first in range(0, len(choices), size) if capacity else ():
        assert capacity is not None
        tokens = [token for token in range(first, first + size) if mask[token]]
        limit = max(1, math.ceil(capacity.factor * len(tokens) * config.top_k / config.num_experts))
        for expert in range(config.num_experts):
            wanted = [(token, choices[token]) for token in tokens if expert in choices[token].experts]
            if capacity.drop_by == "score":
                wanted.sort(key=lambda pair: -float(pair[1].weights.detach()[pair[1].experts.index(expert)]))
            dropped.update((token, expert) for token, _ in wanted[limit:])
    return dropped


def _expert(x: Tensor, weights: ReferenceWeights, expert: int, config: MoEConfig) -> Tensor:
    if weights.to_latent_LD is not None:
        x = weights.to_latent_LD @ x
    gate_up = weights.gate_up_E2FD[expert] @ x
    if weights.gate_up_bias_E2F is not None:
        gate_up = gate_up + weights.gate_up_bias_E2F[expert]
    gate, up = gate_up.chunk(2)
    if config.activation_limit is not None:
        limit = config.activation_limit
        gate, up = torch.clamp(gate, max=limit), torch.clamp(up, -limit, limit)
    gpt_oss = config.expert_activation == "gpt_oss"
    h = (up + 1) * gate * torch.sigmoid(1.702 * gate) if gpt_oss else F.silu(gate) * up
    y = weights.down_EDF[expert] @ h
    if weights.down_bias_ED is not None:
        y = y + weights.down_bias_ED[expert]
    return y if weights.from_latent_DL is None else weights.from_latent_DL @ y


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return down @ (F.silu(gate @ x) * (up @ x))


def _shared(x: Tensor, weights: ReferenceWeights) -> Tensor:
    gate, up, down = weights.shared_gate_FD, weights.shared_up_FD, weights.shared_down_DF
    if gate is None or up is None or down is None:
        return torch.zeros_like(x)
    y = _swiglu(x, gate, up, down)
    if weights.shared_expert_gate_1D is not None:
        y = torch.sigmoid(weights.shared_expert_gate_1D @ x) * y
    return y


def _balance(counts: Tensor, probabilities: list[Tensor], top_k: int) -> Tensor:
    fraction = counts.double() / (len(probabilities) * top_k)
    return counts.numel() * (fraction * torch.stack(probabilities).mean(0)).sum()
