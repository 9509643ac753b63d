"""A model -> parameter groups with and without decay, and the optimizer over them."""

from typing import Any, Final

import torch
from torch import Tensor, nn

from moe.config import OptimizerConfig, TrainConfig
from moe.optim.adamw import AdamW
from moe.optim.matrices import stacks, vectors
from moe.optim.muon import Muon

FROZEN: Final[dict[str, Any]] = {"name": "frozen", "kind": "frozen"}
"""Stands for the group of parameters that no optimizer has."""


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Matrices decay; vectors (norms, biases) do not. Each group has the name that DeepSpeed asks for.

    `kind` says whose the group is: with Muon it has the matrices of hidden layers, AdamW the rest.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = stacks(model) if config.kind == "muon" else {}
    small = vectors(model)
    decayed = [p for p in trained if p not in small and p not in hidden]
    plain = [p for p in trained if p in small]
    decay = config.weight_decay
    groups = [
        {"name": "decayed", "kind": "adamw", "params": decayed, "weight_decay": decay},
        {"name": "plain", "kind": "adamw", "params": plain, "weight_decay": 0.0},
    ]
    if hidden:
        matrices = [p for p in trained if p in hidden]
        groups.append({"name": "hidden", "kind": "muon", "params": matrices, "weight_decay": decay})
    return groups


def make(groups: list[dict[str, Any]], model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of a run; the learning rate is set before every step."""
    config = train.optimizer
    if config.kind == "muon":
        return Muon(groups, config, stacks(model), torch.bfloat16 if train.precision == "bf16" else None)
    return AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def states(group: dict[str, Any]) -> tuple[str, ...]:
    """What the optimizer remembers of each parameter of a group: names of tensors of its shape."""
    return {"muon": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq"), "frozen": ()}[group["kind"]]


def fresh_state(group: dict[str, Any], parameter: Tensor, step: int) -> dict[str, Tensor]:
    """Room for a parameter's state as if `step` steps had been taken; the optimizer makes it only at the first."""
    room = {state: torch.zeros_like(parameter) for state in states(group)}
    if group["kind"] == "adamw":
        # One for each: a shared one would count too fast. On the device, as fused AdamW wants it.
        room["step"] = torch.tensor(float(step), device=parameter.device)
    return room
