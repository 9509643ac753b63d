"""Muon over equal partitions of a flat buffer steps as it does over whole parameters; and it is what DeepSpeed runs."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.config import OptimizerConfig
from moe.optim import Muon, Stack
from moe.optim.share import share
from tests.dist.layouts import OPTIMIZER, ranks_of, start, tiny, train
from tests.harness import run_ranks

STACKS = [Stack(1, 12, 13), Stack(6, 3, 4), Stack(2, 5, 8), Stack(1, 4, 4)]
CONFIG = OptimizerConfig(kind="muon", learning_rate=0.1)
SIZE = -(-sum(stack.count * stack.size for stack in STACKS) // 5)
STEPS = 3


def _tensors(draw: torch.Generator) -> list[Tensor]:
    return [torch.randn(s.count, s.rows, s.columns, generator=draw, dtype=torch.float64) for s in STACKS]


def _gradients() -> list[list[Tensor]]:
    """With matrices that get nothing, all along or at the end, and one whose only element is on its last rank."""
    draw = torch.Generator().manual_seed(1)
    steps = [_tensors(draw) for _ in range(STEPS)]
    for step, gradients in enumerate(steps):
        gradients[1][2] = 0.0
        if step == STEPS - 1:
            gradients[2][0] = 0.0
            gradients[0][0] = 0.0
            gradients[0][0, -1, -1] = 1.0
    return steps


def _groups(tensors: list[nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": tensors, "kind": "muon", "weight_decay": 0.1}]


def _partitioned(rank: int, world_size: int) -> None:
    weights = [nn.Parameter(w) for w in _tensors(torch.Generator().manual_seed(0))]
    whole = Muon(_groups(weights), CONFIG, dict(zip(weights, STACKS, strict=True)))
    ends = torch.tensor([0, *(w.numel() for w in weights)]).cumsum(0).tolist()
    placed = list(zip(ends[:-1], STACKS, strict=True))
    cuts = [cut for index in range(world_size) for cut in share(placed, SIZE, index).cuts]
    assert {len(cut.pieces) for cut in cuts} == {2, 3}

    def mine(parts: list[Tensor]) -> Tensor:
        flat = torch.zeros(SIZE * world_size, dtype=torch.float64)
        flat[: ends[-1]] = torch.cat([part.detach().flatten() for part in parts])
        return flat[rank * SIZE : (rank + 1) * SIZE].clone()

    partition = nn.Parameter(mine(list(weights)))
    ours = Muon(_groups([partition]), CONFIG, {})
    ours.partition(partition, placed, dist.group.WORLD)
    for gradients in _gradients():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        partition.grad = mine(gradients)
        whole.step()
        ours.step()
        torch.testing.assert_close(partition.detach(), mine(list(weights)), rtol=1e-12, atol=1e-12)
        momenta = [whole.state[weight]["momentum"] for weight in weights]
        torch.testing.assert_close(ours.state[partition]["momentum"], mine(momenta), rtol=1e-14, atol=0)


def test_partitions_step_as_the_whole(tmp_path: Path) -> None:
    run_ranks(_partitioned, 5, tmp_path, 5)


def _under_deepspeed(rank: int) -> None:
    """DeepSpeed has a Muon of its own, which it knows by class name and by marks on parameters; it is not this one."""
    run = tiny(
        train={"micro_batch_size": 2, "optimizer": {**OPTIMIZER, "kind": "muon"}},
        parallel={"expert_parallel_size": 2, "zero_stage": 2},
        deepspeed={"zero_optimization": {"round_robin_gradients": True}},
    )
    engine = start(run, ranks_of(rank, 4, 2))
    assert isinstance(engine.wrapped.optimizer.optimizer, Muon)
    assert not any(
        engine.wrapped.optimizer._is_muon_group(group) for group in engine.wrapped.optimizer.bit16_groups
    )
    cuts = [len(place.share.cuts) for place in engine.wrapped.optimizer.optimizer._places.values()]
    assert sum(cuts) > 0, "this layout cuts matrices: the comparison with whole ones means something"
    norm = float(train(engine, 0, 1)[0].gradient_norm)
    engine.wrapped.destroy()
    adamw = tiny(train={"micro_batch_size": 2}, parallel={"expert_parallel_size": 2, "zero_stage": 2})
    assert norm == pytest.approx(float(train(start(adamw, ranks_of(rank, 4, 2)), 0, 1)[0].gradient_norm))


def test_deepspeed_measures_and_clips_what_muon_gets_and_leaves_the_rest_to_it(tmp_path: Path) -> None:
    run_ranks(_under_deepspeed, 4, tmp_path)
