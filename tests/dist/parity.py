"""The same recipe in many layouts, step by step beside one process. As a command: `make parity`.

Prints, for each layout, the largest relative deviation over 20 steps of the loss (all its terms), of the gradient
norm and of the sparse layers' health, and whether every expert was chosen equally often; exits 1 if any is beyond
its bound.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe.config import RunConfig
from tests.dist.layouts import OPTIMIZER, Curve, curve, ranks_of, start, tiny, train
from tests.harness import run_ranks

GLOBAL_BATCH = 8
DEEPSEEK: dict[str, Any] = {
    "prediction_depth": 1,
    "attention": {
        "num_heads": 4,
        "qk_norm": False,
        "latent": {
            "kv_rank": 10,
            "query_rank": 14,
            "nope_head_dim": 6,
            "rope_head_dim": 4,
            "value_head_dim": 8,
        },
    },
    "moe": {
        "num_experts": 8,
        "top_k": 2,
        "expert_intermediate_size": 24,
        "router_score": "sigmoid",
        "route_scale": 2.5,
        "num_expert_groups": 4,
        "top_k_groups": 2,
        "selection_bias": True,
        "shared_expert_intermediate_size": 20,
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "all switches": {
        "num_layers": 3,
        "intermediate_size": 40,
        "tie_embeddings": True,
        "norm": "layer",
        "norm_placement": "sandwich",
        "attention": {
            "num_heads": 4,
            "num_kv_heads": 1,
            "head_dim": 12,
            "qkv_bias": True,
            "qk_norm": "full",
            "rope_fraction": 0.5,
            "output_gate": True,
            "scale": 0.4,
        },
        "moe": {
            "num_experts": 8,
            "top_k": 3,
            "expert_intermediate_size": 24,
            "normalize_top_k": False,
            "first_k_dense": 1,
            "shared_expert_intermediate_size": 20,
            "shared_expert_gate": True,
        },
    },
    "DeepSeek-V3": DEEPSEEK,
    "DeepSeek-V2": {  # what of it can share sequences: no prediction module
        "attention": DEEPSEEK["attention"],
        "moe": DEEPSEEK["moe"],
    },
    "GPT-OSS, latent": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logit_divisor": 1.5,
        "attention": {
            "num_heads": 4,
            "num_kv_heads": 2,
            "qkv_bias": True,
            "output_bias": True,
            "sinks": True,
            "sliding_window": 5,
            "window_layers": [1],
        },
        "moe": {
            "router_bias": True,
            "num_experts": 8,
            "top_k": 2,
            "expert_intermediate_size": 24,
            "expert_activation": "gpt_oss",
            "activation_limit": 0.2,
            "expert_bias": True,
            "latent_size": 16,
        },
    },
    "experts choose": {
        "moe": {
            "num_experts": 8,
            "top_k": 2,
            "expert_intermediate_size": 24,
            "router_choice": "expert",
            "normalize_top_k": False,
        },
    },
    "four key heads": {
        "attention": {
            "num_heads": 8,
            "num_kv_heads": 4,
            "head_dim": 6,
            "qkv_bias": True,
            "sinks": True,
            "sliding_window": 5,
            "window_layers": [0],
        }
    },
    "dense": {"moe": None, "intermediate_size": 40},
}
BALANCES: dict[str, dict[str, Any]] = {
    "sequence": {},
    "none": {"sequence_loss_weight": 0.0},
    "global batch": {"sequence_loss_weight": 0.0, "global_batch_loss_weight": 0.01},
    "loss-free, sign": {"sequence_loss_weight": 0.0, "bias_update_rate": 0.02},
    "jitter": {"router_jitter": 0.2, "sequence_loss_weight": 0.0, "global_batch_loss_weight": 0.01},
    "all at once": {
        "global_batch_loss_weight": 0.02,
        "bias_update_rate": 0.02,
        "bias_update": "proportional",
    },
}


@dataclass(frozen=True)
class Layout:
    """How the same training is spread."""

    world_size: int
    expert_parallel_size: int
    zero_stage: int
    accumulation: int
    recompute: str = "none"
    precision: str = "fp32"
    balance: str = "sequence"
    model: str = "sparse"
    optimizer: str = "adamw"
    offload: str = "none"
    sequence_parallel_size: int = 1

    def run(self) -> RunConfig:
        return tiny(
            parallel={
                "expert_parallel_size": self.expert_parallel_size,
                "sequence_parallel_size": self.sequence_parallel_size,
                "zero_stage": self.zero_stage,
                "offload": self.offload,
            },
            train={
                "micro_batch_size": GLOBAL_BATCH // self._data_ranks // self.accumulation,
                "activation_recomputation": self.recompute,
                "precision": self.precision,
                "optimizer": {**OPTIMIZER, "kind": self.optimizer},
            },
            model=MODELS[self.model],
            **({} if self.model == "dense" else {"balance": BALANCES[self.balance]}),
        )

    def reference(self) -> "Layout":
        """One process, ZeRO 1, no accumulation; where experts choose, with the same micro-batches."""
        micro_batches = self._data_ranks * self.accumulation if self.model == "experts choose" else 1
        same = {name: getattr(self, name) for name in ("precision", "balance", "model", "optimizer")}
        return Layout(1, 1, 1, micro_batches, **same)

    @property
    def _data_ranks(self) -> int:
        return self.world_size // self.sequence_parallel_size


def grid() -> list[Layout]:
    """Every ZeRO stage, expert parallelism and accumulation on 1, 2 and 4 processes, with recomputation and without."""
    return [
        Layout(world, ep, zero, accumulation, recompute)
        for world in (1, 2, 4)
        for ep in (1, 2, 4)
        if ep <= world
        for zero in (0, 1, 2, 3)
        for accumulation in (1, 2)
        for recompute in ("none", "block")
    ]


def matrix() -> list[Layout]:
    """Half of the grid, where every two of its settings meet; other balancing scopes, models, optimizers on some."""
    layouts = [
        layout
        for layout in grid()
        if (layout.recompute == "block")
        == ((layout.expert_parallel_size.bit_length() + layout.zero_stage + layout.accumulation) % 2 == 1)
    ]
    layouts += [
        Layout(w, ep, z, a, balance="global batch")
        for w, ep, z, a in ((2, 2, 1, 1), (2, 1, 2, 2), (4, 2, 0, 2), (2, 2, 3, 2))
    ]
    layouts += [
        Layout(w, ep, z, a, offload=offload)
        for w, ep, z, a, offload in (
            (2, 2, 1, 2, "optimizer"),
            (2, 1, 2, 2, "optimizer"),
            (2, 2, 3, 2, "optimizer"),
            (2, 1, 3, 1, "all"),
            (4, 2, 3, 2, "all"),
        )
    ]
    deepseek = "DeepSeek-V3"
    layouts += [
        Layout(w, ep, z, a, balance=balance, model=deepseek, recompute="block" if a == 2 else "none")
        for balance in ("loss-free, sign", "all at once")
        for w, ep, z, a in ((1, 1, 1, 2), (2, 2, 2, 1), (4, 2, 0, 2), (4, 2, 3, 1), (4, 4, 1, 1))
    ]
    layouts += [
        Layout(w, ep, z, 2, model="all switches") for w, ep, z in ((2, 2, 1), (4, 2, 0), (4, 2, 3), (4, 4, 2))
    ]
    layouts += [
        Layout(w, ep, z, 2, recompute="experts", model=model)
        for model, w, ep, z in (
            ("all switches", 2, 2, 0),
            ("GPT-OSS, latent", 2, 1, 2),
            ("GPT-OSS, latent", 2, 2, 3),
            ("GPT-OSS, latent", 4, 4, 1),
        )
    ]
    layouts += [
        Layout(w, ep, z, a, balance="jitter", recompute="block" if a == 2 else "none")
        for w, ep, z, a in ((1, 1, 1, 2), (2, 2, 1, 1), (4, 2, 2, 2))
    ]
    layouts += [
        Layout(w, ep, z, a, balance="none", model="experts choose", recompute="block" if a == 2 else "none")
        for w, ep, z, a in ((2, 2, 1, 2), (2, 2, 3, 1), (4, 2, 2, 1), (4, 4, 0, 1))
    ]
    layouts += [Layout(w, 1, z, 1, model="dense") for w, z in ((2, 0), (2, 2), (2, 3), (4, 1))]
    layouts += [
        Layout(w, ep, z, a, optimizer="muon") for w, ep, z, a in ((1, 1, 0, 2), (2, 2, 0, 1), (2, 1, 2, 1))
    ]
    layouts += [
        Layout(4, ep, z, a, model="all switches", optimizer="muon")
        for ep, z, a in ((1, 2, 1), (2, 1, 2), (4, 1, 1))
    ]
    layouts.append(Layout(2, 2, 1, 2, model="GPT-OSS, latent", optimizer="muon"))
    return [*layouts, *_sharing_sequences()]


def _sharing_sequences() -> list[Layout]:
    """Over every ZeRO stage, beside EP groups that are smaller, equal and larger; each balancing scope; recompute."""
    four_heads: dict[str, Any] = {"sequence_parallel_size": 4, "model": "four key heads"}
    return [
        Layout(2, 1, 0, 1, sequence_parallel_size=2),
        Layout(2, 2, 2, 2, sequence_parallel_size=2, recompute="block"),
        Layout(4, 2, 1, 2, sequence_parallel_size=2),
        Layout(4, 4, 2, 1, **four_heads),
        Layout(4, 2, 1, 2, **four_heads, recompute="block", balance="jitter"),
        Layout(4, 2, 2, 2, sequence_parallel_size=2, model="DeepSeek-V2", balance="all at once"),
        Layout(4, 2, 3, 2, sequence_parallel_size=2, recompute="block"),
        Layout(4, 1, 3, 1, sequence_parallel_size=2, model="dense"),
        Layout(4, 4, 1, 1, sequence_parallel_size=2, optimizer="muon"),
        Layout(4, 2, 3, 2, sequence_parallel_size=2, balance="global batch"),
    ]


def quick() -> list[Layout]:
    """A quarter of the matrix, with every world size, EP, stage and accumulation: what `make test` has time for."""
    return [layout for turn, layout in enumerate(matrix()) if turn % 4 == 0]


def everything() -> list[Layout]:
    """The whole grid, and the others of the matrix: what the command shows."""
    return [*grid(), *(layout for layout in matrix() if layout not in grid())]


@dataclass(frozen=True)
class Deviation:
    """Largest over the steps; relative."""

    loss: float
    gradient_norm: float
    counts_equal: bool
    health: float


def deviation(curve: Curve, reference: Curve) -> Deviation:
    """How far a layout's curve is from one process."""
    terms = ("total", "cross_entropy", "load_balancing", "router_z", "further")
    return Deviation(
        max(_relative(getattr(curve, term), getattr(reference, term)) for term in terms),
        _relative(curve.gradient_norm, reference.gradient_norm),
        curve.tokens_per_expert == reference.tokens_per_expert,
        _relative(_flat(curve), _flat(reference)) if reference.health else 0.0,
    )


def _flat(curve: Curve) -> list[float]:
    return [value for step in curve.health for name in sorted(step) for value in step[name]]


def curves(layouts: Sequence[Layout], folder: Path, steps: int = 20) -> dict[Layout, Curve]:
    """Train every layout, those of one world size within one set of processes."""
    found: dict[Layout, Curve] = {}
    for world_size in sorted({layout.world_size for layout in layouts}):
        here = [layout for layout in layouts if layout.world_size == world_size]
        run_ranks(
            _train_all, world_size, folder, world_size, here, steps, folder, timeout_s=60 + 30 * len(here)
        )
        for index, layout in enumerate(here):
            page: dict[str, Any] = json.loads((folder / f"{world_size}-{index}.json").read_text())
            found[layout] = Curve(**page)
    return found


def _train_all(rank: int, world_size: int, layouts: Sequence[Layout], steps: int, folder: Path) -> None:
    for index, layout in enumerate(layouts):
        groups = (layout.expert_parallel_size, layout.sequence_parallel_size)
        engine = start(layout.run(), ranks_of(rank, world_size, *groups))
        found = curve(train(engine, 0, steps))
        engine.wrapped.destroy()
        if rank == 0:
            (folder / f"{world_size}-{index}.json").write_text(json.dumps(dataclasses.asdict(found)))


def _relative(ours: Sequence[float], reference: Sequence[float]) -> float:
    assert len(ours) == len(reference) > 0
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, reference, strict=True))


def main() -> int:
    layouts = everything()
    with tempfile.TemporaryDirectory() as folder:
        found = curves([*{layout.reference() for layout in layouts}, *layouts], Path(folder))
    table = Table(
        "processes",
        "EP",
        "SP",
        "ZeRO",
        "accumulation",
        "recompute",
        "offload",
        "balance",
        "model",
        "optimizer",
        "loss",
        "grad norm",
        "health",
        "counts",
    )
    failed = 0
    for layout in layouts:
        far = deviation(found[layout], found[layout.reference()])
        right = far.loss < 1e-5 and far.gradient_norm < 1e-4 and far.health < 1e-5 and far.counts_equal
        failed += not right
        groups = (layout.expert_parallel_size, layout.sequence_parallel_size)
        cells = (layout.world_size, *groups, layout.zero_stage, layout.accumulation)
        counts = "equal" if far.counts_equal else "differ"
        shown = (
            layout.recompute,
            layout.offload,
            layout.balance,
            layout.model,
            layout.optimizer,
            f"{far.loss:.1e}",
            f"{far.gradient_norm:.1e}",
            f"{far.health:.1e}",
            counts,
        )
        table.add_row(*map(str, cells), *shown, style=None if right else "red")
    Console(width=130).print(table)
    print(f"{len(layouts) - failed} of {len(layouts)} layouts equal one process over 20 steps in fp32")  # noqa: T201
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
