"""A saved state is the run: 20 steps straight equal 10, a new engine and 10 more, to the bit, at any ZeRO stage."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from moe.checkpoint.read import SavedModel
from moe.checkpoint.resume import restore
from moe.checkpoint.save import TrainState, save
from moe.config import RunConfig
from moe.errors import CheckpointError
from tests.dist.layouts import OPTIMIZER, curve, ranks_of, start, tiny, train
from tests.harness import run_ranks

MOE = {
    "num_experts": 8,
    "top_k": 2,
    "expert_intermediate_size": 24,
    "router_score": "sigmoid",
    "selection_bias": True,
}
LAYOUTS = [
    (0, "fp32", "adamw"),
    (1, "fp32", "adamw"),
    (2, "fp32", "adamw"),
    (1, "bf16", "adamw"),
    (2, "bf16", "adamw"),
    (3, "fp32", "adamw"),
    (3, "bf16", "adamw"),
    (1, "fp32", "muon"),
    (2, "bf16", "muon"),
]
OTHERS = [
    (1, 1, 0, "adamw"),
    (1, 1, 1, "adamw"),
    (2, 1, 2, "adamw"),
    (4, 4, 1, "adamw"),
    (4, 2, 2, "adamw"),
    (4, 2, 3, "adamw"),
    (2, 2, 3, "adamw"),
    (1, 1, 3, "adamw"),
    (1, 1, 0, "muon"),
    (2, 1, 2, "muon"),
    (4, 2, 1, "muon"),
]
HALF, END = 10, 20


def _run(
    folder: Path, ep: int, zero: int, precision: str = "fp32", optimizer: str = "adamw", **train: object
) -> RunConfig:
    return tiny(
        run_dir=str(folder),
        parallel={"expert_parallel_size": ep, "zero_stage": zero},
        train={
            "micro_batch_size": 2,
            "precision": precision,
            "optimizer": {**OPTIMIZER, "kind": optimizer},
            **train,
        },
        model={"moe": MOE},
        balance={"bias_update_rate": 0.01, "bias_update": "proportional", "router_jitter": 0.05},
    )


def _straight_and_resumed(rank: int, folder: Path) -> None:
    """For each layout: 20 steps with a save at 10; then a new engine from that save, to 20."""
    for zero, precision, optimizer in LAYOUTS:
        here = folder / f"{zero}-{precision}-{optimizer}"
        ranks = ranks_of(rank, 2, 2)
        engine = start(_run(here / "straight", 2, zero, precision, optimizer), ranks)
        straight = curve(train(engine, 0, HALF))
        save(engine, TrainState(HALF, 123), "data")
        if rank == 0:
            shutil.copytree(here / "straight", here / "resumed")
        rest = curve(train(engine, HALF, END))
        save(engine, TrainState(END, 246), "data")
        engine.wrapped.destroy()

        engine = start(_run(here / "resumed", 2, zero, precision, optimizer), ranks)
        assert restore(engine, "data") == TrainState(HALF, 123)
        again = curve(train(engine, HALF, END))
        save(engine, TrainState(END, 246), "data")
        engine.wrapped.destroy()
        assert straight.total
        assert again == rest, f"ZeRO {zero} {precision} {optimizer}"
        if rank == 0:
            (here / "rest.json").write_text(json.dumps(dataclasses.asdict(rest)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on 2 ranks with EP 2: each layout straight to 20, and resumed at 10."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(_straight_and_resumed, 2, folder, folder, timeout_s=500)
    return folder


def _state(run: Path) -> dict[str, torch.Tensor]:
    saved = SavedModel.open(run, END)
    files = [saved.folder / name for name in saved.manifest.files if name.startswith("state")]
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


@pytest.mark.parametrize(("zero", "precision", "optimizer"), LAYOUTS)
def test_resume_is_exact_to_the_bit(zero: int, precision: str, optimizer: str, runs: Path) -> None:
    run = runs / f"{zero}-{precision}-{optimizer}"
    straight, resumed = (_state(run / name) for name in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    assert not [key for key in straight if not torch.equal(straight[key], resumed[key])]
    states = {key.partition("/")[0] for key in straight if key.endswith("[7]")}
    moments = {"momentum"} if optimizer == "muon" else {"exp_avg", "exp_avg_sq"}
    assert states == {"weight", *moments}
    assert {"exp_avg/head.weight", "exp_avg_sq/head.weight"} < straight.keys()
    biases = [tensor for key, tensor in straight.items() if key.endswith("selection_bias_E")]
    assert len(biases) == 2
    assert all(bias.dtype == torch.float32 and float(bias.abs().max()) > 1e-3 for bias in biases)


def _go_on(rank: int, world_size: int, layouts: list[tuple[int, int, str]], runs: Path, folder: Path) -> None:
    for ep, zero, optimizer in layouts:
        here = folder / f"{world_size}-{ep}-{zero}-{optimizer}"
        source = runs / f"1-fp32-{optimizer}/resumed"
        if rank == 0:
            shutil.copytree(source / "checkpoints/step_10", here / "checkpoints/step_10")
        dist.barrier()
        engine = start(_run(here, ep, zero, optimizer=optimizer), ranks_of(rank, world_size, ep))
        assert restore(engine, "data") == TrainState(HALF, 123)
        rest = curve(train(engine, HALF, END))
        engine.wrapped.destroy()
        if rank == 0:
            (here / "rest.json").write_text(json.dumps(dataclasses.asdict(rest)))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_checkpoint_goes_on_in_another_layout(world_size: int, runs: Path, tmp_path: Path) -> None:
    """Written on 2 ranks with EP 2 and ZeRO 1; read elsewhere: the next steps are those of the run that went on."""
    layouts = [layout for world, *layout in OTHERS if world == world_size]
    run_ranks(_go_on, world_size, tmp_path, world_size, layouts, runs, tmp_path)
    for ep, zero, optimizer in layouts:
        whole = json.loads((runs / f"1-fp32-{optimizer}/rest.json").read_text())
        rest = json.loads((tmp_path / f"{world_size}-{ep}-{zero}-{optimizer}" / "rest.json").read_text())
        for term in ("total", "gradient_norm"):
            assert rest[term] == pytest.approx(whole[term], rel=1e-6), (ep, zero, optimizer, term)
        assert rest["tokens_per_expert"] == whole["tokens_per_expert"]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _nonsense(path: Path) -> None:
    path.write_text('{"format": "turnout-checkpoint", "vers')


def _newer(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))


def _edited(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a flipped byte": ("state-00001.safetensors", _flip, r"state-00001.*hash.*go on from step_10"),
    "a cut file": ("state-00000.safetensors", _cut, r"state-00000.*bytes"),
    "a missing file": ("state-00000.safetensors", Path.unlink, r"state-00000.*missing"),
    "another recipe": ("recipe.yaml", _flip, r"recipe.yaml.*hash"),
    "a cut manifest": ("manifest.json", _nonsense, r"manifest.json cannot be read"),
    "an edited manifest": ("manifest.json", _edited, r"manifest.json is not what was written.*step_10"),
    "a missing manifest": ("manifest.json", Path.unlink, r"step_20 has no manifest.json.*damaged"),
    "a newer format": ("manifest.json", _newer, r"version 99, but this version reads"),
}


def _all_refused(rank: int, folder: Path) -> None:
    ranks = ranks_of(rank, 2, 2)
    for name, (_, _, words) in DAMAGE.items():
        engine = start(_run(folder / name, 2, 1), ranks)
        with pytest.raises(CheckpointError, match=words):
            restore(engine, "data")
    whole = folder / "whole"
    with pytest.raises(CheckpointError, match="trained on other data"):
        restore(start(_run(whole, 2, 1), ranks), "other data")
    with pytest.raises(CheckpointError, match=r"train.global_batch_size was 8 and is 16"):
        restore(start(_run(whole, 2, 1, global_batch_size=16), ranks), "data")
    with pytest.raises(CheckpointError, match=r"train.optimizer.kind was 'adamw' and is 'muon'"):
        restore(start(_run(whole, 2, 1, optimizer="muon"), ranks), "data")
    with pytest.raises(CheckpointError, match=r"at step 20, but train.steps is 15"):
        restore(start(_run(whole, 2, 1, steps=15), ranks), "data")


def test_what_cannot_be_trusted_is_refused_by_every_rank(runs: Path, tmp_path: Path) -> None:
    for name, (file, damage, _) in DAMAGE.items():
        shutil.copytree(runs / "1-fp32-adamw/straight", tmp_path / name)
        damage(tmp_path / name / "checkpoints/step_20" / file)
    shutil.copytree(runs / "1-fp32-adamw/straight", tmp_path / "whole")
    run_ranks(_all_refused, 2, tmp_path, tmp_path)


@pytest.mark.parametrize("name", DAMAGE)
def test_readers_without_an_engine_refuse_the_same(name: str, runs: Path, tmp_path: Path) -> None:
    file, damage, words = DAMAGE[name]
    shutil.copytree(runs / "1-fp32-adamw/straight", tmp_path / "run")
    damage(tmp_path / "run/checkpoints/step_20" / file)
    with pytest.raises(CheckpointError, match=words):
        SavedModel.open(tmp_path / "run")
    assert SavedModel.open(tmp_path / "run", HALF).step == HALF


def test_a_torn_save_is_never_the_newest(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "1-fp32-adamw/straight", tmp_path / "run"))
    (run / "checkpoints/step_20").rename(run / "checkpoints/.torn-step_20")
    (run / "checkpoints/step_030").mkdir()
    assert SavedModel.open(run).step == HALF
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 20\. It has 10"):
        SavedModel.open(run, 20)
