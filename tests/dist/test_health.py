"""The health of sparse layers over real ranks: that of the whole batch, counted once, remembered by a checkpoint."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from moe.checkpoint.resume import restore
from moe.checkpoint.save import TrainState, save
from moe.config import RunConfig
from moe.dist import Ranks
from moe.model import Transformer, initialize
from moe.sparse import Capacity, health
from moe.sparse.router import Router
from tests.dist.layouts import batches, plain, ranks_of, start, tiny
from tests.harness import run_ranks
from tests.unit.test_health import loops

MOE = {
    "num_experts": 8,
    "top_k": 2,
    "expert_intermediate_size": 24,
    "router_score": "sigmoid",
    "selection_bias": True,
}
GLOBAL = {"sequence_loss_weight": 0.0, "global_batch_loss_weight": 0.01}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "recomputed": ({"activation_recomputation": "block"}, {}),
    "counted in a pass of its own": ({}, GLOBAL),
    "both": ({"activation_recomputation": "block"}, GLOBAL),
}
"""(train, balance); after an evaluation all of them must see the same."""


def _run(
    train: dict[str, Any] | None = None, balance: dict[str, Any] | None = None, **sections: Any
) -> RunConfig:
    return tiny(
        model={"moe": MOE},
        parallel={"expert_parallel_size": 2},
        train={"micro_batch_size": 2, **(train or {})},
        balance={"bias_update_rate": 0.001, "capacity_factor": 1.1, **(balance or {})},
        **sections,
    )


def _biases() -> list[torch.Tensor]:
    """Some that steer: the two layers have other ranges."""
    return [torch.linspace(-0.03, 0.05, 8), torch.linspace(0.02, -0.01, 8)]


@torch.no_grad()
def _bias(model: Transformer) -> None:
    for there, bias in zip(model.selection_biases(), _biases(), strict=True):
        there.copy_(bias)


def _first_step(rank: int, folder: Path) -> None:
    for name, (train, balance) in WAYS.items():
        engine = start(_run(train, balance), ranks_of(rank, 2, 2))
        _bias(engine.model)
        here = batches(engine.run, engine.ranks, 0)
        engine.evaluate(here)
        result = engine.step(here, 0, observe=True)
        assert result.health is not None
        assert result.tokens_per_expert is not None
        assert result.num_dropped is not None
        page = {
            "health": plain(result.health),
            "tokens_per_expert": result.tokens_per_expert.tolist(),
            "num_dropped": result.num_dropped.tolist(),
        }
        (folder / f"{name}-{rank}.json").write_text(json.dumps(page))
        assert engine.step(here, 1).health is None
        engine.wrapped.destroy()


def _expected() -> dict[str, Any]:
    """By one process without DeepSpeed, micro-batch by micro-batch, and by loops over its tokens."""
    run = _run()
    model = Transformer(run.model, capacity=Capacity.of(run.balance))
    initialize(model, run.seed)
    _bias(model)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    logits: list[list[list[float]]] = [[] for _ in routers]
    chosen: list[list[list[int]]] = [[] for _ in routers]
    dropped = [0 for _ in routers]
    for batch in batches(run, Ranks(), 0):
        mask = batch.mask_BS.flatten()
        seen: list[Any] = []
        hooks = [
            router.register_forward_hook(lambda *call, seen=seen: seen.append(call[2])) for router in routers
        ]
        model(batch.input_ids_BS, batch.labels_BS, batch.mask_BS)
        for hook in hooks:
            hook.remove()
        limit = math.ceil(1.1 * int(mask.sum()) * 2 / 8)
        for layer, routing in enumerate(seen):
            logits[layer] += routing.logits_TE.double()[mask].tolist()
            ids = routing.ids_TK[mask].tolist()
            chosen[layer] += ids
            counts = [sum(expert in row for row in ids) for expert in range(8)]
            dropped[layer] += sum(max(0, count - limit) for count in counts)
    layers = [
        loops(rows, "sigmoid") | {"bias_min": float(bias.min()), "bias_max": float(bias.max())}
        for rows, bias in zip(logits, _biases(), strict=True)
    ]
    return {
        "health": {name: [layer[name] for layer in layers] for name in layers[0]},
        "tokens_per_expert": [[sum(e in row for row in rows) for e in range(8)] for rows in chosen],
        "num_dropped": dropped,
    }


def test_every_rank_knows_the_health_of_the_whole_batch_counted_once(tmp_path: Path) -> None:
    """Two ranks, EP 2, two micro-batches each; recomputed, counted beforehand, evaluated in between or not."""
    run_ranks(_first_step, 2, tmp_path, tmp_path)
    expected = _expected()
    assert min(expected["num_dropped"]) > 0
    for name in WAYS:
        for rank in (0, 1):
            found = json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            assert found["tokens_per_expert"] == expected["tokens_per_expert"], name
            assert found["num_dropped"] == expected["num_dropped"], name
            assert found["health"].keys() == expected["health"].keys()
            for quantity, values in expected["health"].items():
                assert found["health"][quantity] == pytest.approx(values, rel=1e-6), (name, quantity)


def _starve(rank: int, folder: Path) -> None:
    ranks = ranks_of(rank, 2, 2)
    run = _run({"steps": 9}, {"capacity_factor": None}, run_dir=str(folder / "run"))
    engine, state = start(run, ranks), TrainState()
    bias = engine.model.selection_biases()[0]
    bias[3], dead = -9.0, []
    for step in range(6):
        if step == 5:
            bias[3] = 9.0
        result = engine.step(batches(run, ranks, step), step)
        state = state.after(result.num_tokens, result.tokens_per_expert)
        assert state.steps_since_use_LE is not None
        dead.append(health.dead_experts(state.steps_since_use_LE, after=3).tolist())
        if step == 2:
            save(engine, TrainState(3, 99), "data")
        if step == 3:
            save(engine, state, "data")
            at_save = state.steps_since_use_LE
            assert at_save.tolist()[0][3] == 4
    assert dead == [[0, 0], [0, 0], [1, 0], [1, 0], [1, 0], [0, 0]], dead
    engine.wrapped.destroy()

    engine = start(run, ranks)
    again = restore(engine, "data")
    assert again == TrainState(4, 4 * 8 * 32)
    assert again.steps_since_use_LE is not None
    assert again.steps_since_use_LE.dtype == torch.int64
    assert torch.equal(again.steps_since_use_LE, at_save)

    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder / "run/checkpoints/step_4")
    dist.barrier()
    older = restore(engine, "data")  # of a time when nobody counted
    assert (older, older.steps_since_use_LE) == (TrainState(3, 99), None)


def test_a_starved_expert_dies_is_remembered_by_a_checkpoint_and_revives(tmp_path: Path) -> None:
    run_ranks(_starve, 2, tmp_path, tmp_path)


class _Reads(TorchDispatchMode):
    """Counts values that are copied to the host, which waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _reads(rank: int) -> None:
    run = tiny(model={"moe": MOE}, balance={"bias_update_rate": 0.001})
    engine, counts = start(run, ranks_of(rank, 1, 1)), []
    state = TrainState()
    for step, observe in enumerate([False, False, True]):
        with _Reads() as reads:
            result = engine.step(batches(run, engine.ranks, step), step, observe=observe)
            state = state.after(result.num_tokens, result.tokens_per_expert)
        counts.append(reads.count)
    with _Reads() as reads:
        float(result.cross_entropy)
    assert reads.count == 1
    assert counts[2] == counts[1], counts


def test_looking_reads_nothing_back_to_the_host(tmp_path: Path) -> None:
    """DeepSpeed reads some values at each step; looking at health adds none."""
    run_ranks(_reads, 1, tmp_path)
