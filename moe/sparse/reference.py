"""The sparse layer again: float64, one token at a time, nothing clever. What fast paths are compared with."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ReferenceWeights:
    """All weights of a layer, all experts, float64 leaves."""

    router_ED: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    shared_gate_FD: Tensor | None = None
    shared_up_FD: Tensor | None = None
    shared_down_DF: Tensor | None = None
    shared_expert_gate_1D: Tensor | None = None


@dataclass(frozen=True)
class ReferenceOutput:
    """y [T, D]; the terms of the losses, each a scalar with gradient; counts int64 [E]."""

    y_TD: Tensor
    load_balancing_loss: Tensor
    z_loss: Tensor
    counts_E: Tensor


def sparse_layer(
    x_TD: Tensor, weights: ReferenceWeights, *, top_k: int, normalize: bool, mask_T: Tensor | None = None
) -> ReferenceOutput:
    """The layer's definition over the whole batch of T tokens, with the global-batch balancing loss.

    Raises `ValueError` unless every tensor is float64.
    """
    tensors = [x_TD, *(t for t in vars(weights).values() if t is not None)]
    if any(t.dtype != torch.float64 for t in tensors):
        raise ValueError("the reference is defined in float64: convert x and every weight with .double()")
    num_tokens, num_experts = x_TD.shape[0], weights.router_ED.shape[0]
    mask = [True] * num_tokens if mask_T is None else mask_T.tolist()
    outputs, probabilities, z_terms = [], [], []
    counts = torch.zeros(num_experts, dtype=torch.int64)
    for x, kept in zip(x_TD, mask, strict=True):
        logits = weights.router_ED @ x
        probability = torch.softmax(logits, dim=0)
        chosen = torch.topk(probability, top_k).indices
        weight = probability[chosen]
        if normalize:
            weight = weight / weight.sum()
        y = torch.zeros_like(x)
        if kept:
            for w, e in zip(weight, chosen.tolist(), strict=True):
                gate, up = weights.gate_up_E2FD[e].chunk(2)
                y = y + w * _swiglu(x, gate, up, weights.down_EDF[e])
            counts[chosen] += 1
            probabilities.append(probability)
            z_terms.append(torch.logsumexp(logits, dim=0) ** 2)
        outputs.append(y + _shared(x, weights))
    zero = x_TD.sum() * 0
    return ReferenceOutput(
        y_TD=torch.stack(outputs) if outputs else x_TD * 0,
        load_balancing_loss=_balance(counts, probabilities, top_k) if probabilities else zero,
        z_loss=torch.stack(z_terms).mean() if z_terms else zero,
        counts_E=counts,
    )


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
