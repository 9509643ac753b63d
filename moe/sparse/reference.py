"""The sparse layer again: float64, one token at a time, nothing clever. What fast paths are compared with."""

import itertools
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
    router_bias_E: Tensor | None = None
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
    sequence_loss: Tensor
    """The same within each sequence that has a token which counts; their mean."""
    micro_batch_loss: Tensor
    """The same within each micro-batch, 0 where no token counts; their mean."""
    z_loss: Tensor
    counts_E: Tensor
    num_dropped: int


@dataclass(frozen=True)
class _Scored:
    """What the router thinks of one token."""

    logits_E: Tensor
    scores_E: Tensor
    probabilities_E: Tensor
    log_sum_exp: Tensor


@dataclass(frozen=True)
class _Choice:
    """Where one token goes."""

    experts: list[int]
    weights: Tensor


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
    sequences: int = 1,
) -> ReferenceOutput:
    """The layer's definition over the whole batch of T tokens, with its balancing losses of every scope.

    Capacities, experts that choose and turns count within each of the `micro_batches` equal parts of the batch, which
    also consists of so many equal `sequences`; `jitter_TD` are factors on what the router sees. Raises `ValueError`
    unless every tensor is float64 and the parts are equal.
    """
    tensors = [x_TD, *(t for t in vars(weights).values() if t is not None)]
    if any(t.dtype != torch.float64 for t in tensors):
        raise ValueError("the reference is defined in float64: convert x and every weight with .double()")
    if len(x_TD) % micro_batches or len(x_TD) % sequences:
        raise ValueError(
            f"{len(x_TD)} tokens are not {micro_batches} equal micro-batches and {sequences} equal sequences"
        )
    mask = [True] * len(x_TD) if mask_T is None else mask_T.tolist()
    seen_TD = x_TD if jitter_TD is None else x_TD * jitter_TD
    scored = [_score(x, weights, config) for x in seen_TD]
    parts = _parts(mask, micro_batches)
    visits = _visits(scored, parts, config, selection_bias_E)
    choices = [_weigh(token, experts, config) for token, experts in zip(scored, visits, strict=True)]
    dropped = _dropped(choices, parts, config, capacity)
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
    kept = [token for token, counted in enumerate(mask) if counted]
    zero = x_TD.sum() * 0

    def balance(tokens: list[int]) -> Tensor:
        return _balance(tokens, scored, visits, config) if tokens else zero

    by_sequence = [balance(tokens) for tokens in _parts(mask, sequences) if tokens]
    return ReferenceOutput(
        y_TD=torch.stack(outputs),
        load_balancing_loss=balance(kept),
        sequence_loss=torch.stack(by_sequence).mean() if kept else zero,
        micro_batch_loss=torch.stack([balance(tokens) for tokens in parts]).mean(),
        z_loss=torch.stack([scored[token].log_sum_exp ** 2 for token in kept]).mean() if kept else zero,
        counts_E=counts,
        num_dropped=len(dropped),
    )


def _score(x: Tensor, weights: ReferenceWeights, config: MoEConfig) -> _Scored:
    logits = weights.router_ED @ x
    if weights.router_bias_E is not None:
        logits = logits + weights.router_bias_E
    scores = torch.sigmoid(logits) if config.router_score == "sigmoid" else torch.softmax(logits, 0)
    return _Scored(logits, scores, scores / scores.sum(), torch.logsumexp(logits, 0))


def _parts(mask: list[bool], number: int) -> list[list[int]]:
    """The unmasked tokens of each of so many equal parts."""
    size = len(mask) // number
    return [[t for t in range(first, first + size) if mask[t]] for first in range(0, len(mask), size)]


def _visits(
    scored: list[_Scored], parts: list[list[int]], config: MoEConfig, bias_E: Tensor | None
) -> list[list[int]]:
    """The experts of each token."""
    if config.router_choice == "token":
        return [_best(token.scores_E.detach(), config, bias_E) for token in scored]
    visits: list[list[int]] = [[] for _ in scored]
    num_experts, top_k = config.num_experts, config.top_k
    for tokens in parts:
        if config.router_choice == "round_robin":
            stride = next(s for s in itertools.count(num_experts // top_k) if math.gcd(s, num_experts) == 1)
            deck = itertools.cycle(card * stride % num_experts for card in range(num_experts))
            for token in tokens:
                visits[token] = list(itertools.islice(deck, top_k))
            continue
        for expert in range(num_experts):
            ranked = sorted(tokens, key=lambda token: -float(scored[token].scores_E.detach()[expert]))
            for token in ranked[: math.ceil(len(tokens) * top_k / num_experts)]:
                visits[token].append(expert)
    return visits


def _best(scores: Tensor, config: MoEConfig, bias_E: Tensor | None) -> list[int]:
    preference = scores + (0 if bias_E is None else bias_E)
    allowed = _allowed(preference, config)
    return sorted(allowed, key=lambda expert: -float(preference[expert]))[: config.top_k]


def _weigh(token: _Scored, experts: list[int], config: MoEConfig) -> _Choice:
    if config.sparsemixer_margin is not None:
        weights = _sparsemixer(token.logits_E, experts, config.sparsemixer_margin)
    else:
        weights = token.scores_E[experts]
        if config.normalize_top_k:
            weights = weights / weights.sum()
    return _Choice(experts, weights * config.route_scale)


def _sparsemixer(logits_E: Tensor, experts: list[int], margin: float) -> Tensor:
    """Each chosen expert's softmax over those not chosen before it that are near the best of them."""
    logits, left, weights = logits_E.tolist(), list(range(len(logits_E))), []
    for expert in experts:
        best = max(logits[e] for e in left)
        near = [e for e in left if best - logits[e] <= 2 * margin * max(abs(logits[e]), best)]
        weights.append(torch.softmax(logits_E[near], 0)[near.index(expert)])
        left.remove(expert)
    return torch.stack(weights)


def _allowed(preference: Tensor, config: MoEConfig) -> list[int]:
    if config.num_expert_groups is None or config.top_k_groups is None:
        return list(range(config.num_experts))
    size = config.num_experts // config.num_expert_groups
    groups = [list(range(first, first + size)) for first in range(0, config.num_experts, size)]
    best = 1 if config.group_score == "max" else 2
    groups.sort(key=lambda group: -sum(sorted((float(preference[e]) for e in group), reverse=True)[:best]))
    return [expert for group in groups[: config.top_k_groups] for expert in group]


def _dropped(
    choices: list[_Choice], parts: list[list[int]], config: MoEConfig, capacity: Capacity | None
) -> set[tuple[int, int]]:
    """(token, expert) of choices that find their expert full."""
    dropped: set[tuple[int, int]] = set()
    for tokens in parts if capacity else ():
        assert capacity is not None
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
    if config.expert_activation == "gpt_oss":
        h = (up + 1) * gate * torch.sigmoid(config.activation_alpha * gate)
    else:
        h = F.silu(gate) * up
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


def _balance(tokens: list[int], scored: list[_Scored], visits: list[list[int]], config: MoEConfig) -> Tensor:
    """E sum_i f_i P_i: f_i is the share of these tokens' choices that fell on expert i, P_i its mean probability."""
    chosen = [expert for token in tokens for expert in visits[token]]
    probability_E = torch.stack([scored[token].probabilities_E for token in tokens]).mean(0)
    total = torch.zeros((), dtype=torch.float64)
    for expert in range(config.num_experts):
        total = total + chosen.count(expert) / (len(tokens) * config.top_k) * probability_E[expert]
    return config.num_experts * total
