"""Adapters on attention and experts: the same training in all layouts, frozen weights that stay, saves that go on."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.checkpoint.read import SavedModel
from moe.checkpoint.resize import resize
from moe.checkpoint.resume import restore
from moe.checkpoint.save import TrainState, save
from moe.checkpoint.tensors import Reader
from moe.config import MoEConfig, RunConfig
from moe.engine.engine import Engine
from moe.model.lora import trained
from moe.sparse import ExpertLayout, SparseMoE
from moe.sparse.lora import adapt_experts, pairs
from moe.sparse.reference import ReferenceWeights, sparse_layer
from tests.dist.layouts import OPTIMIZER, batches, curve, ranks_of, start, tiny, train
from tests.harness import run_ranks

ALL = ["attention", "experts", "shared_expert", "dense"]
TARGETS: dict[str, list[str]] = {"all": ALL, "experts": ["experts"], "attention": ["attention"]}
LAYOUTS = [(1, 0), (1, 1), (2, 1), (2, 2), (1, 3), (2, 3)]
"""(EP, ZeRO), on 2 ranks."""
HALF, END = 4, 8

pytestmark = pytest.mark.slow
ADAPTERS = 2


def _run(
    folder: Path, ep: int, zero: int, targets: list[str], precision: str = "fp32", kind: str = "adamw"
) -> RunConfig:
    return tiny(
        run_dir=str(folder),
        lora={"rank": 4, "alpha": 8.0, "targets": targets},
        parallel={"expert_parallel_size": ep, "zero_stage": zero},
        train={"micro_batch_size": 2, "precision": precision, "optimizer": {**OPTIMIZER, "kind": kind}},
        model={
            "intermediate_size": 20,
            "moe": {
                "num_experts": 8,
                "top_k": 2,
                "expert_intermediate_size": 24,
                "first_k_dense": 1,
                "router_score": "sigmoid",
                "selection_bias": True,
                "shared_expert_intermediate_size": 20,
            },
        },
    )


def _in_all_layouts(rank: int, folder: Path) -> None:
    """Half of the steps, a save, and the other half by the same engine and by a new one."""
    for name, (ep, zero) in itertools.product(TARGETS, LAYOUTS):
        here = folder / f"{name}-{ep}-{zero}"
        straight, rest, again = _train_and_resume(rank, here, ep, zero, TARGETS[name])
        assert again == rest, here.name
        if rank == 0:
            (here / "curve.json").write_text(
                json.dumps([dataclasses.asdict(straight), dataclasses.asdict(rest)])
            )


def _train_and_resume(rank: int, here: Path, *settings: Any) -> tuple[Any, Any, Any]:
    ranks = ranks_of(rank, 2, settings[0])
    engine = start(_run(here / "run", *settings), ranks)
    straight = curve(train(engine, 0, HALF))
    save(engine, TrainState(HALF, 1), "data")
    if rank == 0:
        shutil.copytree(here / "run", here / "again")
    rest = curve(train(engine, HALF, END))
    save(engine, TrainState(END, 2), "data")
    engine.wrapped.destroy()
    engine = start(_run(here / "again", *settings), ranks)
    assert restore(engine, "data") == TrainState(HALF, 1)
    again = curve(train(engine, HALF, END))
    save(engine, TrainState(END, 2), "data")
    engine.wrapped.destroy()
    return straight, rest, again


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    run_ranks(_in_all_layouts, 2, folder, folder, timeout_s=500)
    return folder


def _one_process(rank: int, folder: Path) -> None:
    for name, targets in TARGETS.items():
        engine = start(_run(folder / "unused", 1, 1, targets), ranks_of(rank, 1, 1))
        found = [dataclasses.asdict(curve(train(engine, *steps))) for steps in ((0, HALF), (HALF, END))]
        (folder / f"{name}.json").write_text(json.dumps(found))
        engine.wrapped.destroy()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(_one_process, 1, folder, folder)
    return folder


@pytest.mark.parametrize(("name", "layout"), itertools.product(TARGETS, LAYOUTS), ids=str)
def test_every_layout_trains_adapters_as_one_process_does(
    name: str, layout: tuple[int, int], layouts: Path, alone: Path
) -> None:
    ep, zero = layout
    found = json.loads((layouts / f"{name}-{ep}-{zero}/curve.json").read_text())
    expected = json.loads((alone / f"{name}.json").read_text())
    for half, wanted in zip(found, expected, strict=True):
        for term in ("total", "cross_entropy", "gradient_norm"):
            assert half[term] == pytest.approx(wanted[term], rel=1e-5), term
        assert half["tokens_per_expert"] == wanted["tokens_per_expert"]


@pytest.mark.parametrize(("ep", "zero"), LAYOUTS)
def test_frozen_weights_are_saved_as_they_were_and_adapters_with_moments(
    ep: int, zero: int, layouts: Path
) -> None:
    here = layouts / f"all-{ep}-{zero}/run"
    first, last = (_tensors(here, step) for step in (HALF, END))
    assert first.keys() == last.keys()
    frozen = [key for key in first if "lora" not in key]
    assert {key.split("/")[0] for key in frozen} == {"weight", "steps_since_use"} & {
        key.split("/")[0] for key in frozen
    }
    assert all(torch.equal(first[key], last[key]) for key in frozen)
    for state, half in itertools.product(("weight", "exp_avg", "exp_avg_sq"), ("a", "b")):
        for name in (
            "layers.0.ffn.up.weight",
            "layers.1.ffn.experts.gate_up",
            "layers.1.attention.query.weight",
        ):
            expert = "[7]" if "experts" in name else ""
            key = f"{state}/{name}_lora_{half}{expert}"
            assert not torch.equal(first[key], last[key]), key


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_trained_is_what_was_counted(name: str, layouts: Path) -> None:
    saved = SavedModel.open(layouts / f"{name}-2-3/run")
    moments = sum(
        t.numel()
        for key, t in _tensors(layouts / f"{name}-2-3/run", END).items()
        if key.startswith("exp_avg/")
    )
    assert saved.run.lora is not None
    counts = trained(saved.run.model, saved.run.lora)
    assert moments == sum(counts.values())
    assert list(counts) == TARGETS[name]
    heads = {"query": 32, "key": 16, "value": 16, "output": 32}
    by_hand = {
        "attention": 2 * sum(4 * (32 + out) for out in heads.values()),
        "experts": 8 * 4 * ((32 + 48) + (24 + 32)),
        "shared_expert": 4 * 3 * (32 + 20),
        "dense": 4 * 3 * (32 + 20),
    }
    assert counts == {target: by_hand[target] for target in TARGETS[name]}


def test_a_checkpoint_goes_to_another_layout_by_hash_on_disk_and_in_the_engine(
    layouts: Path, alone: Path, tmp_path: Path
) -> None:
    shutil.copytree(layouts / "all-2-3/run", tmp_path / "run")
    shutil.rmtree(tmp_path / f"run/checkpoints/step_{END}")
    (tmp_path / "run/recipe.yaml").write_text(
        (tmp_path / f"run/checkpoints/step_{HALF}/recipe.yaml").read_text()
    )
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    resize(tmp_path / "moved", {"world": 1, "ep": 1, "zero": 1})
    expected = json.loads((alone / "all.json").read_text())[1]
    run_ranks(_goes_on, 1, tmp_path, tmp_path, expected)


def _goes_on(rank: int, folder: Path, expected: dict[str, list[float]]) -> None:
    for name in ("run", "moved"):
        engine = start(_run(folder / name, 1, 1, ALL), ranks_of(rank, 1, 1))
        assert restore(engine, "data") == TrainState(HALF, 1)
        rest = curve(train(engine, HALF, END))
        assert rest.total == pytest.approx(expected["total"], rel=1e-5)
        engine.wrapped.destroy()


def _in_bf16_and_by_muon(rank: int, folder: Path) -> None:
    for ep, zero, precision, kind in (
        (2, 1, "bf16", "adamw"),
        (2, 3, "bf16", "adamw"),
        (2, 2, "fp32", "muon"),
    ):
        here = folder / f"{ep}-{zero}-{precision}-{kind}"
        _, rest, again = _train_and_resume(rank, here, ep, zero, ALL, precision, kind)
        assert again == rest, here.name
        if rank == 0:
            first, last = (_tensors(here / "run", step) for step in (HALF, END))
            moved = [
                key for key in first if key.startswith("weight/") and not torch.equal(first[key], last[key])
            ]
            assert all("lora" in key for key in moved)
            assert len(moved) == sum("lora" in key for key in first if key.startswith("weight/"))


def test_bf16_and_muon_train_adapters_and_go_on_to_the_bit(tmp_path: Path) -> None:
    run_ranks(_in_bf16_and_by_muon, 2, tmp_path, tmp_path)


def _tensors(run: Path, step: int) -> dict[str, Tensor]:
    saved = SavedModel.open(run, step)
    with Reader(saved.folder, saved.manifest) as reader:
        return {key: reader.get(key).clone() for key in saved.manifest.tensors}


def _at_start(rank: int) -> None:
    adapted = tiny(lora={"rank": 4, "alpha": 8.0, "targets": ["attention", "experts"]})
    losses = []
    for run in (adapted, tiny()):
        engine: Engine = start(run, ranks_of(rank, 1, 1))
        losses.append(train(engine, 0, 1)[0].cross_entropy)
        engine.wrapped.destroy()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0.0)  # sums of rows are taken in another order


def test_adapters_do_not_change_the_function_at_step_0(tmp_path: Path) -> None:
    run_ranks(_at_start, 1, tmp_path)


def _learns(rank: int) -> None:
    optimizer = {"learning_rate": 2e-2, "gradient_clipping": 1.0, "weight_decay": 0.0}
    run = tiny(
        lora={"rank": 4, "alpha": 16.0, "targets": ["attention", "experts"]},
        train={"optimizer": optimizer, "schedule": {"kind": "constant"}},
        model={"init_std": 0.2},
    )
    engine = start(run, ranks_of(rank, 1, 1))
    same = batches(run, engine.ranks, 1)
    losses = [float(engine.step(same, step).cross_entropy) for step in range(40)]
    engine.wrapped.destroy()
    assert losses[-1] < 0.5 * losses[0], losses


def test_adapters_learn_a_batch_by_heart(tmp_path: Path) -> None:
    run_ranks(_learns, 1, tmp_path)


CONFIGS = {
    "plain": MoEConfig(num_experts=8, top_k=3, expert_intermediate_size=5),
    "biases, clamped": MoEConfig(
        num_experts=8,
        top_k=2,
        expert_intermediate_size=5,
        expert_activation="gpt_oss",
        activation_limit=0.7,
        expert_bias=True,
    ),
    "latent": MoEConfig(num_experts=8, top_k=2, expert_intermediate_size=5, latent_size=6),
}
HIDDEN, TOKENS, RANK, SCALE = 7, 24, 3, 1.7


def _against_reference(rank: int, world_size: int) -> None:
    for name, recompute in itertools.product(CONFIGS, (False, True)):
        config, draw = CONFIGS[name], torch.Generator().manual_seed(3)
        ranks = ranks_of(rank, world_size, world_size)
        layout = ExpertLayout(config.num_experts, world_size, rank, ranks.expert_group)
        whole = _random(SparseMoE(HIDDEN, config, ExpertLayout(config.num_experts)), draw)
        part = _random(SparseMoE(HIDDEN, config, layout, recompute=recompute), draw)
        mine = layout.local_experts
        with torch.no_grad():
            for key, parameter in part.named_parameters():
                full = whole.get_parameter(key)
                parameter.copy_(full[mine.start : mine.stop] if key.startswith("experts.") else full)
        x_TD = torch.randn(TOKENS, HIDDEN, generator=draw, dtype=torch.float64).requires_grad_()
        cotangent_TD = torch.randn(TOKENS, HIDDEN, generator=draw, dtype=torch.float64)
        mask_T = torch.rand(TOKENS, generator=draw) > 0.2
        expected = sparse_layer(x_TD, _effective(whole), config, mask_T=mask_T)
        (expected.y_TD * cotangent_TD).sum().backward()

        size = TOKENS // world_size
        here = slice(rank * size, (rank + 1) * size)
        x_here = x_TD.detach()[here].clone().requires_grad_()
        y_TD, _ = part(x_here, mask_T[here])
        torch.testing.assert_close(y_TD, expected.y_TD[here], rtol=1e-10, atol=1e-12)
        (y_TD * cotangent_TD[here]).sum().backward()
        torch.testing.assert_close(x_here.grad, x_TD.grad[here], rtol=1e-9, atol=1e-12)
        count = 0
        for key, parameter in part.named_parameters():
            if "lora" in key:
                wanted = whole.get_parameter(key).grad
                assert wanted is not None
                torch.testing.assert_close(
                    parameter.grad, wanted[mine.start : mine.stop], rtol=1e-9, atol=1e-12
                )
                count += 1
            else:
                assert parameter.grad is None, f"{key} is frozen"
        assert count == 2 * ADAPTERS


def _random(layer: SparseMoE, draw: torch.Generator) -> SparseMoE:
    """Frozen, adapters on the experts, all weights drawn, float64."""
    layer.requires_grad_(False)
    adapt_experts(layer.experts, RANK, SCALE)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.5
    return layer


def _effective(layer: SparseMoE) -> ReferenceWeights:
    """W + scale B A, differentiable in A and B."""
    found = {name: getattr(layer.experts, name) + SCALE * b @ a for name, a, b in pairs(layer.experts)}
    experts = layer.experts
    return ReferenceWeights(
        router_ED=layer.router.weight,
        gate_up_E2FD=found["gate_up"],
        down_EDF=found["down"],
        gate_up_bias_E2F=experts.gate_up_bias,
        down_bias_ED=experts.down_bias,
        to_latent_LD=None if layer.to_latent is None else layer.to_latent.weight,
        from_latent_DL=None if layer.from_latent is None else layer.from_latent.weight,
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_adapted_experts_equal_the_reference_forward_and_in_gradients(
    world_size: int, tmp_path: Path
) -> None:
    run_ranks(_against_reference, world_size, tmp_path, world_size)
