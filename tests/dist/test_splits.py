"""One global batch, cut in every way over ranks, micro-batches and expert-parallel groups: the same balancing.

Through the engine itself: the global-batch loss, the exact counts, and the biases that they move.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.config import RunConfig
from moe.engine.engine import Engine
from moe.sparse.product import Products
from tests.dist.layouts import ranks_of, start, tiny, train
from tests.harness import run_ranks

GLOBAL_BATCH = 16
RULES = ("sign", "proportional")
WAYS = [*RULES, *(f"{rule}, by oneDNN" for rule in RULES if torch.backends.mkldnn.is_available())]
"""A rule, and who multiplies: the splits of each way are compared among themselves."""
SPLITS = [
    (world, accumulation, ep)
    for world in (1, 2, 4)
    for accumulation in (1, 2, 4)
    for ep in (1, 2, 4)
    if ep <= world
]


@dataclass(frozen=True)
class Found:
    """What one step says of the batch."""

    load_balancing: float
    router_z: float
    tokens_per_expert: list[list[int]]
    biases: list[list[str]]
    """float32, in hexadecimal: no bit is lost on the way."""


def _run(rule: str, world_size: int, accumulation: int, ep: int) -> RunConfig:
    """Routers of wide weights, so that loads differ, and steps too small to change one: rules can take turns."""
    return tiny(
        parallel={"expert_parallel_size": ep},
        train={
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": GLOBAL_BATCH // world_size // accumulation,
            "optimizer": {"learning_rate": 1e-30},
        },
        model={
            "init_std": 0.2,
            "moe": {"num_experts": 8, "top_k": 2, "expert_intermediate_size": 24, "selection_bias": True},
        },
        balance={
            "sequence_loss_weight": 0.0,
            "global_batch_loss_weight": 0.01,
            "bias_update_rate": 0.013,
            "bias_update": rule,
        },
    )


def _step(engine: Engine) -> Found:
    """From biases that are odd already, so that their move is not all there is."""
    biases = engine.model.selection_biases()
    for layer, bias_E in enumerate(biases):
        bias_E.copy_(0.0037 * (layer + 1) * (torch.arange(8) - 3.3))
    result = train(engine, 0, 1)[0]
    assert result.tokens_per_expert is not None
    return Found(
        float(result.load_balancing),
        float(result.router_z),
        result.tokens_per_expert.tolist(),
        [[number.hex() for number in bias_E.tolist()] for bias_E in biases],
    )


def _all_splits(rank: int, world_size: int, folder: Path) -> None:
    for split in SPLITS:
        if split[0] != world_size:
            continue
        engine = start(_run(RULES[0], *split), ranks_of(rank, world_size, split[2]))
        for way in WAYS:
            engine.run = _run(way.partition(",")[0], *split)
            with pytest.MonkeyPatch.context() as patch:
                if "oneDNN" in way:
                    patch.setattr(Products, "of", lambda like, rows, weight: Products(like.dtype, rows > 0))
                found = _step(engine)
            (folder / f"{way}-{split}-{rank}.json").write_text(json.dumps(vars(found)))
        engine.wrapped.destroy()


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Any, int], Found]:
    """(way, split, rank) -> what was found; one set of processes for each world size."""
    folder = tmp_path_factory.mktemp("splits")
    for world_size in (1, 2, 4):
        run_ranks(_all_splits, world_size, folder, world_size, folder)
    return {
        (way, split, rank): Found(**json.loads((folder / f"{way}-{split}-{rank}.json").read_text()))
        for way in WAYS
        for split in SPLITS
        for rank in range(split[0])
    }


@pytest.mark.parametrize("way", WAYS)
def test_counts_and_biases_are_equal_to_the_bit_on_every_rank_of_every_split(
    way: str, steps: dict[tuple[str, Any, int], Found]
) -> None:
    one = steps[way, (1, 1, 1), 0]
    assert len(SPLITS) == 18
    for split in SPLITS:
        for rank in range(split[0]):
            found = steps[way, split, rank]
            assert found.tokens_per_expert == one.tokens_per_expert, (split, rank)
            assert found.biases == one.biases, (split, rank)


@pytest.mark.parametrize("way", WAYS)
def test_the_global_batch_loss_is_that_of_one_process_whatever_the_split(
    way: str, steps: dict[tuple[str, Any, int], Found]
) -> None:
    """Sums of float32 in another order: a few units in the last place."""
    one = steps[way, (1, 1, 1), 0]
    for split in SPLITS:
        found = steps[way, split, 0]
        assert found.load_balancing == pytest.approx(one.load_balancing, rel=1e-6), split
        assert found.router_z == pytest.approx(one.router_z, rel=1e-6), split


def test_the_batch_is_lopsided_and_partly_masked_and_the_rules_differ(
    steps: dict[tuple[str, Any, int], Found],
) -> None:
    """What is compared is something: an unequal load, moved biases, fewer tokens than positions."""
    sign, proportional = (steps[rule, (1, 1, 1), 0] for rule in RULES)
    assert sign.tokens_per_expert == proportional.tokens_per_expert
    assert sign.biases != proportional.biases
    assert sign.load_balancing > 1.03
    for counts in sign.tokens_per_expert:
        assert max(counts) > 1.5 * min(counts)
        assert sum(counts) == (GLOBAL_BATCH * 32 - 16 - 32) * 2
