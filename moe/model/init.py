"""Seed -> weights that depend on the parameter and the expert, never on layout or world size."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe.model.attention import Attention
from moe.model.head import Head
from moe.model.norm import RMSNorm
from moe.model.transformer import Transformer
from moe.seed import stream
from moe.sparse import SparseMoE
from moe.sparse.experts import Experts
from moe.sparse.router import Router
from moe.sparse.swiglu import SwiGLU


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Fill every weight in place: normal of `init_std`; matrices that write to the residual stream get
    init_std / sqrt(2 num_layers) (GPT-2, section 2.3); norms 1; biases 0.

    Each global expert has a stream of its own, so a rank draws only what it holds.
    """
    std = model.config.init_std
    out_std = std / math.sqrt(2 * model.config.num_layers)
    filled: set[int] = set()
    latent = model.config.moe.latent_size if model.config.moe else None

    def draw(parameter: Tensor, std: float, *key: str | int) -> None:
        drawn = torch.empty(parameter.shape, dtype=torch.float32)
        parameter.copy_(drawn.normal_(0.0, std, generator=stream("init", seed, *key)))

    for name, module in model.named_modules():
        match module:
            case RMSNorm():
                module.weight.fill_(1.0)
            case nn.Embedding() | Head() | Router():
                draw(module.weight, std, name)
            case Experts():
                for local, expert in enumerate(module.layout.local_experts):
                    draw(module.gate_up[local], std, name, "gate_up", expert)
                    draw(module.down[local], out_std if latent is None else std, name, "down", expert)
                for bias in (module.gate_up_bias, module.down_bias):
                    if bias is not None:
                        bias.zero_()
            case Attention():
                for part in ("query", "key", "value", "output"):
                    _linear(
                        getattr(module, part), draw, out_std if part == "output" else std, f"{name}.{part}"
                    )
            case SwiGLU():
                for part in ("gate", "up", "down"):
                    _linear(getattr(module, part), draw, out_std if part == "down" else std, f"{name}.{part}")
            case SparseMoE():
                for part in ("shared_expert_gate", "to_latent", "from_latent"):
                    if (linear := getattr(module, part)) is not None:
                        _linear(linear, draw, out_std if part == "from_latent" else std, f"{name}.{part}")
                        filled.add(id(linear.weight))
                continue
            case _:
                continue
        filled.update(id(parameter) for parameter in module.parameters())
    if model.config.tie_embeddings:
        draw(model.embed.weight, std, "embed")
    missed = [name for name, parameter in model.named_parameters() if id(parameter) not in filled]
    assert not missed, f"no rule initialises {missed}"


def _linear(linear: nn.Linear, draw: Callable[..., None], std: float, name: str) -> None:
    draw(linear.weight, std, name)
    if linear.bias is not None:
        linear.bias.zero_()
