"""A state goes from any of four layouts to any other: the same by hash, and the same training from there on."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest

from moe.checkpoint import folder as folders
from moe.checkpoint import state as states
from moe.checkpoint.resume import restore
from moe.checkpoint.save import TrainState, save
from moe.checkpoint.tensors import hash_of
from moe.config import RunConfig
from tests.dist.layouts import curve, ranks_of, start, tiny, train
from tests.harness import run_ranks

LAYOUTS = [(4, 4, 1), (4, 2, 3), (2, 2, 2), (1, 1, 0)]
"""(ranks, EP, ZeRO)."""
HALF, END = 10, 20


def _run(folder: Path, ep: int, zero: int) -> RunConfig:
    return tiny(
        run_dir=str(folder),
        parallel={"expert_parallel_size": ep, "zero_stage": zero},
        train={"micro_batch_size": 2},
        model={
            "moe": {
                "num_experts": 8,
                "top_k": 2,
                "expert_intermediate_size": 24,
                "router_score": "sigmoid",
                "selection_bias": True,
                "shared_expert_intermediate_size": 20,
            }
        },
        balance={"bias_update_rate": 0.01},
    )


def _name(layout: tuple[int, int, int]) -> str:
    return "-".join(map(str, layout))


def _straight(rank: int, world_size: int, folder: Path) -> None:
    for layout in (layout for layout in LAYOUTS if layout[0] == world_size):
        here, (_, ep, zero) = folder / _name(layout), layout
        engine = start(_run(here / "run", ep, zero), ranks_of(rank, world_size, ep))
        train(engine, 0, HALF)
        save(engine, TrainState(HALF), "data")
        rest = curve(train(engine, HALF, END))
        engine.wrapped.destroy()
        if rank == 0:
            (here / "rest.json").write_text(json.dumps(dataclasses.asdict(rest)))


def _resized(rank: int, world_size: int, folder: Path) -> None:
    for target, source in itertools.permutations(LAYOUTS, 2):
        if target[0] != world_size:
            continue
        here, (_, ep, zero) = folder / f"{_name(source)}-to-{_name(target)}", target
        ranks = ranks_of(rank, world_size, ep)
        if rank == 0:
            shutil.copytree(folder / _name(source) / "run", here / "run")
        ranks.barrier()
        engine = start(_run(here / "run", ep, zero), ranks)
        assert restore(engine, "data") == TrainState(HALF)
        mine = {key: hash_of(tensor.cpu()) for key, tensor in states.collect(engine)}
        found = {key: xxh3 for part in ranks.gather(mine) for key, xxh3 in part.items()}
        rest = curve(train(engine, HALF, END))
        engine.wrapped.destroy()
        if rank == 0:
            (here / "hashes.json").write_text(json.dumps(found))
            (here / "rest.json").write_text(json.dumps(dataclasses.asdict(rest)))


@pytest.fixture(scope="module")
def resized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resized")
    for work in (_straight, _resized):
        for world_size in (1, 2, 4):
            run_ranks(work, world_size, folder, world_size, folder)
    return folder


@pytest.mark.parametrize(("source", "target"), itertools.permutations(LAYOUTS, 2), ids=str)
def test_resized_equals_never_stopped(
    source: tuple[int, int, int], target: tuple[int, int, int], resized: Path
) -> None:
    here, origin = resized / f"{_name(source)}-to-{_name(target)}", resized / _name(source)
    written = folders.read_manifest(folders.step_folder(origin / "run", HALF)).tensors
    found = json.loads((here / "hashes.json").read_text())
    expected = {key: saved.xxh3 for key, saved in written.items()}
    assert found == expected
    for state in ("weight", "exp_avg", "exp_avg_sq"):
        assert f"{state}/layers.1.ffn.experts.gate_up[7]" in expected
    rest, straight = (json.loads((place / "rest.json").read_text()) for place in (here, origin))
    for term in ("total", "cross_entropy"):
        assert rest[term] == pytest.approx(straight[term], rel=1e-6), term
    assert rest["tokens_per_expert"] == straight["tokens_per_expert"]
