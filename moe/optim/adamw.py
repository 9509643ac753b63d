"""AdamW (arXiv:1711.05101) over groups with and without decay."""

from typing import Any

import torch
from torch import nn

from moe.config import OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Matrices decay; vectors (norms, biases) do not. Each group has the name that DeepSpeed asks for."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [
        {"name": "decayed", "params": decayed, "weight_decay": config.weight_decay},
        {"name": "plain", "params": plain, "weight_decay": 0.0},
    ]


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer of a run; the learning rate is set before every step."""
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
