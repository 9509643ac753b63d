"""A model -> the same model, frozen, with low-rank adapters where a recipe wants them; and how many that trains."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from moe.config import LoraConfig, ModelConfig
from moe.config.lora import Target
from moe.model.attention import Attention
from moe.model.block import Block
from moe.model.transformer import Transformer
from moe.seed import stream
from moe.sparse import SparseMoE
from moe.sparse.experts import Experts
from moe.sparse.linear import Linear
from moe.sparse.lora import AdaptedExperts, adapt_experts, adapt_linear, pairs
from moe.sparse.swiglu import SwiGLU


def adapt(model: Transformer, lora: LoraConfig | None) -> Transformer:
    """Freeze `model` and give it adapters, uninitialised, in place; None: leave it as it is. Returns it.

    Names of weights stay; adapters are called as what they adapt, and `_lora_a` or `_lora_b`.
    """
    if lora is None:
        return model
    model.requires_grad_(False)
    for _, module in list(_targeted(model, lora)):
        if isinstance(module, Experts):
            adapt_experts(module, lora.rank, lora.scale)
        else:
            adapt_linear(module, lora.rank, lora.scale)
    return model


@torch.no_grad()
def fill_adapters(part: nn.Module, place: str, seed: int) -> None:
    """Fill the adapters in a part of a model, where it stands at `place`: B 0, so that the function does not change;
    A uniform within 1 / sqrt(its columns), as `peft` has it.

    Each adapter, and each global expert's, has a stream of its own, so that nothing depends on the layout.
    """
    for name, module in part.named_modules(prefix=place):
        for weight, a, b in pairs(module):
            b.zero_()
            bound = 1 / math.sqrt(a.shape[-1])
            if isinstance(module, AdaptedExperts):
                drawn = [(a[local], expert) for local, expert in enumerate(module.layout.local_experts)]
            else:
                drawn = [(a, 0)]
            for matrix, expert in drawn:
                generator = stream("adapter", seed, name, weight, expert)
                fresh = torch.empty(matrix.shape, dtype=torch.float32)
                matrix.copy_(fresh.uniform_(-bound, bound, generator=generator))


def trained(config: ModelConfig, lora: LoraConfig) -> dict[Target, int]:
    """How many parameters each target's adapters have, all experts counted."""
    with torch.device("meta"):
        model = adapt(Transformer(config), lora)
    counts: dict[Target, int] = dict.fromkeys(lora.targets, 0)
    for target, module in _targeted(model, lora):
        counts[target] += sum(half.numel() for _, a, b in pairs(module) for half in (a, b))
    return counts


def sentence(counts: dict[Target, int], total: int) -> str:
    """For the log; `total`: parameters of the frozen model."""
    number = sum(counts.values())
    each = ", ".join(f"{target} {count:,}" for target, count in counts.items())
    return (
        f"adapters have {number:,} trained parameters, {number / total:.2%} of the frozen {total:,}: {each}"
    )


def _targeted(model: Transformer, lora: LoraConfig) -> Iterator[tuple[Target, Linear | Experts]]:
    """What the recipe gives adapters, bottom to top; each once."""
    for layer in model.layers:
        assert isinstance(layer, Block)
        for target, home in _homes(layer):
            if home is not None and target in lora.targets:
                if isinstance(home, Experts):
                    yield target, home
                else:
                    yield from ((target, module) for module in home.modules() if isinstance(module, Linear))


def _homes(layer: Block) -> Iterator[tuple[Target, Attention | Experts | SwiGLU | None]]:
    """Where in a layer each target's matrices are."""
    yield "attention", layer.attention
    if isinstance(layer.ffn, SparseMoE):
        yield "experts", layer.ffn.experts
        yield "shared_expert", layer.ffn.shared_expert
    else:
        yield "dense", layer.ffn
