"""The global gradient norm when DeepSpeed partitions nothing (ZeRO 0), where its own is wrong."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.dist import Ranks
from moe.engine.groups import is_expert


@torch.no_grad()
def clip_gradients(model: nn.Module, ranks: Ranks, max_norm: float) -> Tensor:
    """Scale the reduced gradients in place to a norm of at most `max_norm` (0: never); returns the norm before.

    Each expert counts once: squares of replicated gradients are taken as they are, those of experts are summed
    over the expert-parallel group. DeepSpeed 0.19.8 averages local norms instead (DeepSpeed#8475).
    """
    squares = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for parameter in model.parameters():
        if parameter.grad is not None:
            squares[int(is_expert(parameter))] += parameter.grad.double().square().sum()
    if ranks.expert_parallel_size > 1:
        experts = squares[1:].clone()
        dist.all_reduce(experts, group=ranks.expert_group)
        squares[1:] = experts
    norm = squares.sum().sqrt()
    if max_norm > 0:
        # As torch and DeepSpeed do: divide by norm + 1e-6.
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale.to(parameter.grad.dtype))
    return norm
