"""Any layout trains as one process does: loss and health within 1e-5, gradient norm within 1e-4, each of 20 steps."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe.data.loader import IGNORED
from tests.dist.layouts import OPTIMIZER, batches, ranks_of, start, tiny, train
from tests.dist.parity import Curve, Layout, curves, deviation, everything, matrix, quick
from tests.harness import run_ranks

REST = [layout for layout in matrix() if layout not in quick()]


def _trained(layouts: list[Layout], folder: Path) -> dict[Layout, Curve]:
    return curves([*{layout.reference() for layout in layouts}, *layouts], folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Curve]:
    return _trained(quick(), tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def slowly_trained(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Curve]:
    return _trained(REST, tmp_path_factory.mktemp("parity"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", quick(), ids=str)
def test_layout_equals_one_process(layout: Layout, trained: dict[Layout, Curve]) -> None:
    _check(layout, trained)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("layout", REST, ids=str)
def test_so_does_the_rest_of_the_matrix(layout: Layout, slowly_trained: dict[Layout, Curve]) -> None:
    _check(layout, slowly_trained)


def _check(layout: Layout, trained: dict[Layout, Curve]) -> None:
    far = deviation(trained[layout], trained[layout.reference()])
    assert far.loss < 1e-5
    assert far.gradient_norm < 1e-4
    assert far.counts_equal
    assert far.health < 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns_and_clips(optimizer: str, trained: dict[Layout, Curve]) -> None:
    """The comparison means something: the loss falls, and gradients are beyond the clip of 0.5."""
    curve = trained[Layout(1, 1, 1, 1, optimizer=optimizer)]
    assert curve.cross_entropy[-1] < curve.cross_entropy[0] - 0.5
    assert min(curve.gradient_norm[:10]) > 0.5
    assert curve.load_balancing[0] >= 1.0


def test_bf16_stays_near_one_process(tmp_path: Path) -> None:
    """bf16 rounds sums in another order: a thousandth of the loss, five of the norm, over 10 steps."""
    layouts = [
        Layout(2, 1, 1, 1, precision="bf16"),
        Layout(2, 2, 1, 4, precision="bf16"),
        Layout(2, 2, 2, 4, precision="bf16"),
        Layout(2, 2, 3, 4, precision="bf16"),
        Layout(2, 2, 1, 2, precision="bf16", offload="optimizer"),
        Layout(2, 2, 3, 2, precision="bf16", offload="all"),
        Layout(2, 2, 2, 1, precision="bf16", optimizer="muon"),
        Layout(2, 2, 1, 1, precision="bf16", sequence_parallel_size=2),
    ]
    found = curves([*{layout.reference() for layout in layouts}, *layouts], tmp_path, steps=10)
    for layout in layouts:
        far = deviation(found[layout], found[layout.reference()])
        assert far.loss < 1e-3, layout
        assert far.gradient_norm < 5e-3, layout


def _evaluated_and_trained(rank: int, folder: Path) -> None:
    for epsilon in (0.0, 0.2):
        run = tiny(balance={"router_jitter": epsilon})
        engine = start(run, ranks_of(rank, 1, 1))
        held_out = batches(run, engine.ranks, 5)
        nats, tokens = engine.evaluate(held_out)
        trained = train(engine, 0, 1)[0]
        engine.wrapped.destroy()
        (folder / str(epsilon)).write_text(json.dumps([float(nats), float(tokens), float(trained.total)]))


def test_evaluation_sees_no_jitter_and_training_does(tmp_path: Path) -> None:
    run_ranks(_evaluated_and_trained, 1, tmp_path, tmp_path)
    plain, jittered = (json.loads((tmp_path / name).read_text()) for name in ("0.0", "0.2"))
    assert plain[:2] == jittered[:2]
    assert abs(plain[2] - jittered[2]) > 1e-6


def _nothing_to_learn(rank: int) -> None:
    run = tiny(
        parallel={"expert_parallel_size": 2},
        train={"optimizer": {**OPTIMIZER, "weight_decay": 0.0}},
        balance={"global_batch_loss_weight": 0.1},
    )
    engine = start(run, ranks_of(rank, 2, 2))
    here = batches(run, engine.ranks, 0)
    before = [p.detach().clone() for p in engine.model.parameters()]
    masked = engine.step([replace(b, mask_BS=torch.zeros_like(b.mask_BS)) for b in here], 0, observe=True)
    assert [float(term) for term in (masked.total, masked.gradient_norm)] == [0.0, 0.0]
    assert masked.tokens_per_expert is not None
    assert not masked.tokens_per_expert.any()
    assert all(torch.equal(p, q) for p, q in zip(engine.model.parameters(), before, strict=True))
    unread = engine.step([replace(b, labels_BS=torch.full_like(b.labels_BS, IGNORED)) for b in here], 1)
    assert float(unread.cross_entropy) == 0.0
    assert float(unread.load_balancing) >= 1.0
    assert 0.0 < float(unread.gradient_norm) < 1.0


def test_a_batch_without_a_token_to_learn_from_is_no_divergence(tmp_path: Path) -> None:
    """All padding, or nothing to predict: means over nothing are 0, and weights stay; balance goes on."""
    run_ranks(_nothing_to_learn, 2, tmp_path)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile"])
def test_the_pages_count_the_layouts_right(page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    (said,) = re.findall(r"(\d+) (?:layouts beside|of them side by side)", text)
    assert int(said) == len(everything())
