"""A tiny recipe, its batches, and the same training in many layouts within one set of processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe.config import RunConfig
from moe.data.loader import Batch
from moe.dist import Ranks, consecutive
from moe.engine.build import build
from moe.engine.engine import Engine
from moe.engine.result import StepResult
from moe.sparse.health import Health

VOCAB, LENGTH = 128, 32
OPTIMIZER = {"learning_rate": 3e-3, "gradient_clipping": 0.5}


def tiny(**sections: Any) -> RunConfig:
    """A sparse model of two layers, 8 experts, top 2; `sections` replace keys of sections."""
    page: dict[str, Any] = {
        "name": "tiny",
        "seed": 11,
        "model": {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "max_sequence_length": LENGTH,
            "attention": {"num_heads": 4, "num_kv_heads": 2},
            "moe": {"num_experts": 8, "top_k": 2, "expert_intermediate_size": 24},
        },
        "data": {"path": "unused", "sequence_length": LENGTH},
        "train": {
            "steps": 20,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp32",
            "optimizer": OPTIMIZER,
            "schedule": {"warmup_steps": 2},
        },
    }
    if sections.get("parallel", {}).get("zero_stage") == 3:
        # Else DeepSpeed keeps parameters as small as these whole on every rank.
        page["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    for name, section in sections.items():
        page[name] = {**page[name], **section} if isinstance(page.get(name), dict) else section
    return RunConfig.model_validate(page)


def batches(run: RunConfig, ranks: Ranks, step: int) -> list[Batch]:
    """This rank's micro-batches of a learnable sequence: x' = 3 x + 1 mod vocabulary, with noise; some masked."""
    draw = torch.Generator().manual_seed(1000 + step)
    rows = run.train.global_batch_size
    ids = torch.empty(rows, LENGTH + 1, dtype=torch.int64)
    ids[:, 0] = torch.randint(VOCAB, (rows,), generator=draw)
    for s in range(LENGTH):
        noise = torch.randint(VOCAB, (rows,), generator=draw)
        ids[:, s + 1] = torch.where(
            torch.rand(rows, generator=draw) < 0.1, noise, (ids[:, s] * 3 + 1) % VOCAB
        )
    mask = torch.ones(rows, LENGTH, dtype=torch.bool)
    mask[0, LENGTH // 2 :] = False  # the shares of ranks differ
    if step % 3 == 0:
        mask[rows - 1] = False
    mine = rows // ranks.data_world_size
    size = run.train.micro_batch_size
    whole = [
        Batch(ids[a : a + size, :-1].contiguous(), ids[a : a + size, 1:].contiguous(), mask[a : a + size])
        for a in range(ranks.data_rank * mine, (ranks.data_rank + 1) * mine, size)
    ]
    return [batch.part(ranks.positions(LENGTH)) for batch in whole]


def ranks_of(rank: int, world_size: int, expert_parallel_size: int, sequence_parallel_size: int = 1) -> Ranks:
    """Ranks within a gloo group that stands already."""
    return Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        expert_parallel_size=expert_parallel_size,
        expert_group=consecutive(expert_parallel_size),
        sequence_parallel_size=sequence_parallel_size,
        sequence_group=consecutive(sequence_parallel_size),
        control_group=dist.group.WORLD,
    )


@dataclass(frozen=True)
class Curve:
    """What a layout must have in common with one process, per step."""

    total: list[float]
    cross_entropy: list[float]
    load_balancing: list[float]
    router_z: list[float]
    further: list[float]
    gradient_norm: list[float]
    tokens_per_expert: list[list[list[int]]]
    health: list[dict[str, list[float]]]


def start(run: RunConfig, ranks: Ranks) -> Engine:
    """A fresh engine."""
    return Engine.start(run, build(run, ranks), ranks)


def train(engine: Engine, first: int, last: int) -> list[StepResult]:
    """Steps first to last - 1."""
    return [
        engine.step(batches(engine.run, engine.ranks, step), step, observe=True)
        for step in range(first, last)
    ]


def curve(results: Sequence[StepResult]) -> Curve:
    """Plain numbers of a run."""
    return Curve(
        total=[float(r.total) for r in results],
        cross_entropy=[float(r.cross_entropy) for r in results],
        load_balancing=[float(r.load_balancing) for r in results],
        router_z=[float(r.router_z) for r in results],
        further=[float(r.further) for r in results],
        gradient_norm=[float(r.gradient_norm) for r in results],
        tokens_per_expert=[r.tokens_per_expert.tolist() for r in results if r.tokens_per_expert is not None],
        health=[plain(r.health) for r in results if r.health is not None],
    )


def plain(health: Health) -> dict[str, list[float]]:
    """Each quantity of each layer."""
    return {name: value.tolist() for name, value in vars(health).items() if value is not None}
