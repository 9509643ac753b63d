"""Muon treats every expert's gate, up and down as the matrix it is, whatever they are stacked or fused in."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe.config import AttentionConfig, ModelConfig, MoEConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from moe.model import Transformer, initialize
from moe.optim import Muon, Stack, make, newton_schulz, parameter_groups, stacks
from moe.optim.newton_schulz import orthogonalize
from moe.optim.share import share

Matrix = npt.NDArray[np.float64]
RATE, DECAY, MOMENTUM = 0.02, 0.1, 0.95
CONFIG = ModelConfig(
    vocab_size=20,
    hidden_size=12,
    num_layers=2,
    intermediate_size=14,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, qkv_bias=True),
    moe=MoEConfig(
        num_experts=3,
        top_k=2,
        expert_intermediate_size=10,
        first_k_dense=1,
        shared_expert_intermediate_size=8,
        shared_expert_gate=True,
    ),
)
TRAIN = TrainConfig(
    steps=10,
    global_batch_size=1,
    micro_batch_size=1,
    precision="fp32",
    optimizer=OptimizerConfig(kind="muon", learning_rate=RATE, weight_decay=DECAY),
    schedule=ScheduleConfig(),
)
EXPERTS = "layers.1.ffn.experts."


def _model(dtype: torch.dtype = torch.float64) -> Transformer:
    model = Transformer(CONFIG)
    initialize(model, 0)
    return model.to(dtype)


def _muon(model: nn.Module) -> Muon:
    optimizer = make(parameter_groups(model, TRAIN.optimizer), model, TRAIN)
    assert isinstance(optimizer, Muon)
    return optimizer


def _gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random, of the size that training has; the last expert gets none."""
    draw = torch.Generator().manual_seed(seed)
    made = {n: 1e-3 * torch.randn(p.shape, generator=draw).to(p) for n, p in model.named_parameters()}
    for name, gradient in made.items():
        if name.startswith(EXPERTS):
            gradient[-1] = 0.0
    return made


def _step(optimizer: torch.optim.Optimizer, model: nn.Module, gradients: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()
    optimizer.step()


# The reference: one matrix, float64, as the papers write it; it knows nothing of stacks, batches or transposes.


def _orthogonal(g: Matrix) -> Matrix:
    x = g / (np.linalg.norm(g) + 1e-7)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x


def _reference(w: Matrix, gradients: list[Matrix]) -> Matrix:
    """arXiv:2502.16982, eq. 1 (with Nesterov's momentum) and 4."""
    m = np.zeros_like(w)
    for g in gradients:
        m = MOMENTUM * m + g
        if g.any():  # a matrix without a gradient only decays
            o = _orthogonal(MOMENTUM * m + g)
            w = w - RATE * (0.2 * np.sqrt(max(w.shape)) * o + DECAY * w)
        else:
            w = w - RATE * DECAY * w
    return w


def _separate(name: str, value: Tensor) -> list[Tensor]:
    """The matrices in a parameter, [R, C] each: written out, not asked of the code under test."""
    if name == EXPERTS + "gate_up":
        return [part for expert in value for part in (expert[:10], expert[10:])]  # gate [10, 12], up [10, 12]
    if name == EXPERTS + "down":
        return list(value)  # [12, 10] each
    return [value]


def _whole(name: str, value: Tensor) -> list[Tensor]:
    """The trap: a stack as one matrix."""
    return [value.flatten(0, -2)]


def _fused(name: str, value: Tensor) -> list[Tensor]:
    """The subtler trap: expert by expert, but gate and up as one."""
    return list(value) if value.ndim == 3 else [value]


Split = Callable[[str, Tensor], list[Tensor]]


def _expected(
    split: Split, before: dict[str, Tensor], gradients: list[dict[str, Tensor]], name: str
) -> Tensor:
    parts = [
        _reference(w.double().numpy(), [g.double().numpy() for g in gs])
        for w, *gs in zip(split(name, before[name]), *(split(name, g[name]) for g in gradients), strict=True)
    ]
    return torch.cat([torch.from_numpy(part).flatten() for part in parts]).view_as(before[name])


def _trained(
    dtype: torch.dtype, steps: int = 4
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], Transformer]:
    """(weights before, gradients of each step, the model after)."""
    model = _model(dtype)
    optimizer = _muon(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = [_gradients(model, seed) for seed in range(steps)]
    for made in gradients:
        _step(optimizer, model, made)
    return before, gradients, model


HIDDEN = {
    *(f"layers.{i}.attention.{part}.weight" for i in (0, 1) for part in ("query", "key", "value", "output")),
    *(f"layers.0.ffn.{part}.weight" for part in ("gate", "up", "down")),
    *(f"layers.1.ffn.shared_expert.{part}.weight" for part in ("gate", "up", "down")),
    "layers.1.ffn.router.weight",
    EXPERTS + "gate_up",
    EXPERTS + "down",
}


def test_muon_has_the_hidden_matrices_and_adamw_the_rest() -> None:
    model = _model()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, TRAIN.optimizer)
    by_kind = {
        kind: {names[id(p)] for group in groups if group["kind"] == kind for p in group["params"]}
        for kind in ("adamw", "muon")
    }
    assert by_kind["muon"] == HIDDEN
    assert by_kind["adamw"] == set(names.values()) - HIDDEN
    assert {"embed.weight", "head.weight", "layers.1.ffn.shared_expert_gate.weight"} < by_kind["adamw"]
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "decayed": DECAY,
        "plain": 0.0,
        "hidden": DECAY,
    }


def test_a_matrix_that_no_rule_covers_is_refused() -> None:
    model = _model()
    model.extra = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(AssertionError, match="extra"):
        stacks(model)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_every_matrix_steps_as_if_it_were_alone(dtype: torch.dtype, bound: float) -> None:
    before, gradients, model = _trained(dtype)
    for name, parameter in model.named_parameters():
        if name in HIDDEN:
            expected = _expected(_separate, before, gradients, name)
            moved = float((expected - before[name]).abs().max())
            assert float((parameter.detach() - expected).abs().max()) < bound * moved, name


@pytest.mark.parametrize(("split", "name"), [(_whole, "gate_up"), (_whole, "down"), (_fused, "gate_up")])
def test_orthogonalising_a_stack_would_be_another_training(split: Split, name: str) -> None:
    before, gradients, model = _trained(torch.float64)
    trapped = _expected(split, before, gradients, EXPERTS + name)
    ours = dict(model.named_parameters())[EXPERTS + name].detach()
    assert float((ours - trapped).norm() / (ours - before[EXPERTS + name]).norm()) > 0.2


def test_the_rest_steps_as_under_adamw() -> None:
    _, gradients, model = _trained(torch.float64)
    other = _model()
    plain = TRAIN.model_copy(update={"optimizer": OptimizerConfig(learning_rate=RATE, weight_decay=DECAY)})
    optimizer = make(parameter_groups(other, plain.optimizer), other, plain)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert not isinstance(optimizer, Muon)
    for made in gradients:
        _step(optimizer, other, made)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs) == (name not in HIDDEN), name


def test_it_agrees_with_the_muon_of_torch() -> None:
    """Which takes matrices one by one, and computes in bf16."""
    before, gradients, model = _trained(torch.float32)
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name in HIDDEN:
        matrices = zip(
            _separate(name, before[name]),
            _separate(name, after[name]),
            *(_separate(name, made[name]) for made in gradients),
            strict=True,
        )
        for start, ours, *parts in matrices:
            if not parts[0].any():
                continue  # theirs has no rule for a matrix without a gradient
            alone = nn.Parameter(start.clone())
            theirs = torch.optim.Muon(
                [alone], lr=RATE, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
            )
            for part in parts:
                alone.grad = part.clone()
                theirs.step()
            assert float((ours - alone.detach()).norm() / (ours - start).norm()) < 0.03, name


def test_an_expert_without_tokens_only_decays() -> None:
    before, gradients, model = _trained(torch.float64)
    for name in ("gate_up", "down"):
        weight = dict(model.named_parameters())[EXPERTS + name].detach()
        kept = (1 - RATE * DECAY) ** len(gradients)
        assert torch.allclose(weight[-1], before[EXPERTS + name][-1] * kept, rtol=1e-12, atol=0)
        assert float((weight - before[EXPERTS + name])[:-1].abs().amax((1, 2)).min()) > RATE * 0.1
        assert bool(weight.isfinite().all())


def test_an_expert_that_loses_its_tokens_stands_still_while_its_momentum_fades() -> None:
    """Orthogonalising what is left of the momentum would send it on at full speed for hundreds of steps."""
    model = _model()
    optimizer = _muon(model)
    experts = model.layers[1].ffn.experts
    _step(optimizer, model, _gradients(model, 0))
    momentum = optimizer.state[experts.down]["momentum"].clone()
    lost, gradients = experts.down[0].detach().clone(), _gradients(model, 1)
    gradients[EXPERTS + "down"][0] = 0.0
    for _ in range(3):
        _step(optimizer, model, gradients)
    assert torch.allclose(experts.down[0], lost * (1 - RATE * DECAY) ** 3, rtol=1e-12, atol=0)
    assert torch.allclose(optimizer.state[experts.down]["momentum"][0], momentum[0] * MOMENTUM**3, rtol=1e-12)
    gradients[EXPERTS + "down"][0, 0, 0] = 1e-3  # a token comes back
    still = experts.down[0].detach().clone()
    _step(optimizer, model, gradients)
    assert float((experts.down[0].detach() - still).abs().max()) > RATE * 0.1


@pytest.mark.parametrize("shape", [(16, 16), (8, 64), (64, 8), (33, 20)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, *shape, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 1e-5, 1e5]).view(
        3, 1, 1
    )
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    core = u.mT @ orthogonalize(x, torch.float64) @ v.mT
    values = torch.diagonal(core, dim1=1, dim2=2)
    well = s > 0.02 * s[:, :1]
    assert float(values[well].min()) > 0.6
    assert float(values.max()) < 1.3
    assert float((core - torch.diag_embed(values)).abs().max()) < 1e-9


def test_an_update_is_as_large_as_adamw_s_whatever_the_shape() -> None:
    draw = torch.Generator().manual_seed(2)
    for shape in ((16, 256), (128, 128), (300, 20)):
        linear = nn.Linear(shape[1], shape[0], bias=False)
        before = linear.weight.detach().clone()
        train = TRAIN.model_copy(
            update={"optimizer": OptimizerConfig(kind="muon", learning_rate=1.0, weight_decay=0.0)}
        )
        groups = parameter_groups(linear, train.optimizer)
        linear.weight.grad = torch.randn(shape, generator=draw)
        make([group for group in groups if group["params"]], linear, train).step()
        assert 0.15 < float((linear.weight.detach() - before).square().mean().sqrt()) < 0.22


def test_zero_stays_zero_and_dust_stays_small() -> None:
    assert not orthogonalize(torch.zeros(2, 4, 6), torch.float32).any()
    dust = torch.full((1, 4, 6), 1e-12)
    assert 0 < float(orthogonalize(dust, torch.float32).abs().max()) < 0.1


def test_bf16_is_near_float64() -> None:
    x = torch.randn(4, 48, 32, generator=torch.Generator().manual_seed(3))
    exact, rough = orthogonalize(x, torch.float64), orthogonalize(x, torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    assert float((rough.double() - exact).norm() / exact.norm()) < 0.03


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    whole = orthogonalize(x, torch.float64)
    monkeypatch.setattr(newton_schulz, "CHUNK_ELEMENTS", 50)
    assert torch.allclose(orthogonalize(x, torch.float64), whole, rtol=1e-12)


@st.composite
def _buffers(draw: st.DrawFn) -> tuple[list[tuple[int, Stack]], int, int]:
    """(stacks and where they begin, with gaps between; partition size; partitions)."""
    sides = st.integers(1, 5)
    placed, end = [], 0
    for _ in range(draw(st.integers(1, 4))):
        end += draw(st.integers(0, 7))
        stack = Stack(draw(sides), draw(sides), draw(sides))
        placed.append((end, stack))
        end += stack.count * stack.size
    number = draw(st.integers(1, 6))
    return placed, -(-(end + draw(st.integers(0, 3))) // number), number


@settings(deadline=None)  # a busy machine is no fault
@given(_buffers())
def test_partitions_hold_every_matrix_once(buffer: tuple[list[tuple[int, Stack]], int, int]) -> None:
    placed, size, number = buffer
    elements = {
        (index, row)
        for index, (start, stack) in enumerate(placed)
        for row in range(start, start + stack.count * stack.size)
    }
    held: list[int] = []
    cut_by: dict[tuple[int, int, int], list[tuple[int, dict[int, slice]]]] = {}
    for index in range(number):
        mine = share(placed, size, index)
        for run in mine.runs:
            assert 0 <= run.here.start < run.here.stop <= size
            assert run.here.stop - run.here.start == run.stack.count * run.stack.size
            held += range(index * size + run.here.start, index * size + run.here.stop)
        for cut in mine.cuts:
            piece = cut.pieces[index]
            begin = index * size + cut.here.start - piece.start
            assert 0 <= cut.here.start < cut.here.stop <= size
            assert cut.here.stop - cut.here.start == piece.stop - piece.start
            held += range(index * size + cut.here.start, index * size + cut.here.stop)
            cut_by.setdefault((begin, cut.rows, cut.columns), []).append((index, cut.pieces))
    assert sorted(held) == sorted(row for _, row in elements)
    for (begin, rows, columns), holders in cut_by.items():
        assert any(
            (stack.rows, stack.columns) == (rows, columns) and (begin - start) % stack.size == 0
            for start, stack in placed
        )
        pieces = holders[0][1]
        assert all(other == pieces for _, other in holders)
        assert [index for index, _ in holders] == list(pieces)
        assert len(pieces) > 1
        assert list(_covered(pieces.values())) == list(range(rows * columns))


def _covered(pieces: Any) -> Iterator[int]:
    for piece in pieces:
        yield from range(piece.start, piece.stop)
