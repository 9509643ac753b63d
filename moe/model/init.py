"""Seed -> weights that depend on the parameter and the expert, never on layout or world size."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.attention import Attention
from moe.model.head import Head
from moe.model.norm import RMSNorm
from moe.model.prediction import Prediction
from moe.model.transformer import Transformer
from moe.seed import stream
from moe.sparse import SparseMoE
from moe.sparse.experts import Experts
from moe.sparse.router import Router
from moe.sparse.swiglu import SwiGLU


def initialize(model: Transformer, seed: int) -> None:
    """Fill every weight in place: normal of `init_std`; matrices that write to the residual stream get
    init_std / sqrt(2 num_layers) (GPT-2, section 2.3); norms 1; biases 0.

    Each global expert has a stream of its own, so a rank draws only what it holds.
    """
    fill(model, "", model.config, seed)


@torch.no_grad()
def fill(part: nn.Module, place: str, config: ModelConfig, seed: int) -> None:
    """`initialize` for one part of a model, where it stands at `place`: its weights do not depend on the others'."""
    std = config.init_std
    out_std = std / math.sqrt(2 * config.num_layers)
    filled: set[int] = set()
    latent = config.moe.latent_size if config.moe else None

    def draw(parameter: Tensor, std: float, *key: str | int) -> None:
        drawn = torch.empty(parameter.shape, dtype=torch.float32)
        parameter.copy_(drawn.normal_(0.0, std, generator=stream("init", seed, *key)))

    for name, module in part.named_modules(prefix=place):
        match module:
            case RMSNorm():
                module.weight.fill_(1.0)
            case nn.LayerNorm():
                module.weight.fill_(1.0)
                module.bias.zero_()
            case nn.Embedding() | Head() | Router():
                if not (
                    isinstance(module, Head) and config.tie_embeddings
                ):  # else it is the embedding's weight
                    draw(module.weight, std, name)
                if isinstance(bias := getattr(module, "bias", None), Tensor):
                    bias.zero_()
            case Experts():
                for local, expert in enumerate(module.layout.local_experts):
                    draw(module.gate_up[local], std, name, "gate_up", expert)
                    draw(module.down[local], out_std if latent is None else std, name, "down", expert)
                for bias in (module.gate_up_bias, module.down_bias):
                    if bias is not None:
                        bias.zero_()
            case Attention():
                for linear, found in module.named_children():
                    if isinstance(found, nn.Linear):
                        _linear(found, draw, out_std if linear == "output" else std, f"{name}.{linear}")
                        filled.update(id(parameter) for parameter in found.parameters())
                if module.sinks is not None:
                    module.sinks.zero_()
                    filled.add(id(module.sinks))
                continue  # its norms come by themselves
            case Prediction():
                _linear(module.project, draw, std, f"{name}.project")
                filled.add(id(module.project.weight))
                continue
            case SwiGLU():
                for linear in ("gate", "up", "down"):
                    _linear(
                        getattr(module, linear),
                        draw,
                        out_std if linear == "down" else std,
                        f"{name}.{linear}",
                    )
            case SparseMoE():
                for linear in ("shared_expert_gate", "to_latent", "from_latent"):
                    if (found := getattr(module, linear)) is not None:
                        _linear(found, draw, out_std if linear == "from_latent" else std, f"{name}.{linear}")
                        filled.add(id(found.weight))
                continue
            case _:
                continue
        filled.update(id(parameter) for parameter in module.parameters())
    missed = [name for name, parameter in part.named_parameters() if id(parameter) not in filled]
    assert not missed, f"no rule initialises {missed}"


def _linear(linear: nn.Linear, draw: Callable[..., None], std: float, name: str) -> None:
    draw(linear.weight, std, name)
    if linear.bias is not None:
        linear.bias.zero_()
