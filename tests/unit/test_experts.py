"""Experts in one node, looped and grouped, beside plain autograd, expert by expert and row by row."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config import MoEConfig
from moe.sparse import SparseMoE, grouped
from moe.sparse.activation import GatedUnit
from moe.sparse.copies import Copies, copies_of
from moe.sparse.desk import Desk
from moe.sparse.experts import Experts, Rows
from moe.sparse.grouped import GroupedExperts
from moe.sparse.looped import LoopedExperts
from moe.sparse.plan import ExpertLayout
from moe.sparse.product import Products
from moe.sparse.spare import Spare
from tests.compiled import COMPILED, KINDS
from tests.onednn import BY_ONEDNN, needs_onednn

UNITS = {
    "swiglu": GatedUnit(),
    "clamped": GatedUnit(limit=0.7),
    "gpt_oss": GatedUnit(1.702, 1.0, 0.7),
}
LOADS = {
    "uneven": [[0, 2], [2, 0], [0, 3], [2, 3], [0, 2]],  # expert 1 starves
    "one expert": [[1], [1], [1]],
    "one token": [[3, 0]],
}
Found = dict[str, Tensor | None]


def _experts(unit: GatedUnit, bias: bool, dtype: torch.dtype, recompute: bool = False) -> Experts:
    draw = torch.Generator().manual_seed(1)
    experts = Experts(16, 8, ExpertLayout(4), unit, bias, recompute)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=draw)
    return experts.to(dtype)


def _run(node: Any, experts: Experts, ids: list[list[int]], made: Tensor | None = None) -> Found:
    draw = torch.Generator().manual_seed(2)
    dtype = experts.down.dtype
    copies = copies_of(torch.tensor(ids), 4, made)
    # Numbers that bf16 holds, so that every dtype starts from the same.
    source = torch.randn(len(ids), 16, generator=draw).bfloat16().to(dtype).requires_grad_()
    weights = torch.rand(len(ids), len(ids[0]), generator=draw).bfloat16().to(dtype).requires_grad_()
    grad = torch.randn(source.shape, generator=draw).bfloat16().to(dtype)
    rows = Rows(source, weights.flatten()[copies.choice_of_row_R], copies)
    y: Tensor = node(experts, rows)
    y.backward(grad)
    return {
        "y": y.detach(),
        "source": source.grad,
        "weights": weights.grad,
        **{name: parameter.grad for name, parameter in experts.named_parameters()},
    }


def _node(function: Any, *arguments: Any) -> Any:
    def run(experts: Experts, rows: Rows) -> Tensor:
        biases = (experts.gate_up_bias, experts.down_bias)
        parameters = (experts.gate_up, biases[0], experts.down, biases[1])
        switches = (experts.unit, experts.recompute, *arguments)
        y: Tensor = function.apply(rows.source_MD, rows.weights_R, *parameters, rows.copies, *switches)
        return y

    return run


def _loop(dtype: torch.dtype, kind: type[Desk] = Desk, by_onednn: bool = False) -> Any:
    return _node(LoopedExperts, Products(dtype, by_onednn), kind, Spare())


GROUPED = _node(GroupedExperts)


def _plainly(experts: Experts, rows: Rows) -> Tensor:
    """By autograd and the activation's formula as its paper has it."""
    y = torch.zeros_like(rows.source_MD)
    row = 0
    unit, limit = experts.unit, experts.unit.limit
    for expert, count in enumerate(rows.copies.rows_per_bucket):
        for _ in range(count):
            source = int(rows.copies.source_of_row_R[row])
            gate_up = experts.gate_up[expert] @ rows.source_MD[source]
            if experts.gate_up_bias is not None:
                gate_up = gate_up + experts.gate_up_bias[expert]
            gate, up = gate_up.chunk(2)
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
            out = experts.down[expert] @ (gate * torch.sigmoid(unit.alpha * gate) * (up + unit.offset))
            if experts.down_bias is not None:
                out = out + experts.down_bias[expert]
            onto = torch.nn.functional.one_hot(torch.tensor(source), len(y)).to(y.dtype)
            y = y + torch.outer(onto, rows.weights_R[row] * out)
            row += 1
    # Parameters that nothing reached have zero gradients, not none.
    return y + sum(0 * parameter.sum() for parameter in experts.parameters())


def _compare(found: Found, expected: Found, tolerance: float) -> None:
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("load", LOADS)
def test_the_loop_equals_the_formula(load: str, unit: str, bias: bool, recompute: bool) -> None:
    experts = _experts(UNITS[unit], bias, torch.float64, recompute)
    found = _run(_loop(torch.float64), experts, LOADS[load])
    experts.zero_grad()
    _compare(found, _run(_plainly, experts, LOADS[load]), 1e-12)


@pytest.mark.parametrize("keeps_sigmoid", [False, True])
@pytest.mark.parametrize("unit", [*UNITS.values(), GatedUnit(1.702, 1.0)])
def test_the_units_gradient_is_right_for_near_and_far_gates(unit: GatedUnit, keeps_sigmoid: bool) -> None:
    gate = torch.linspace(-95, 95, 1901).unsqueeze(0)
    up, grad = (torch.randn(gate.shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    leaves = [t.double().requires_grad_() for t in (gate, up)]
    expected = unit(torch.cat(leaves, dim=1))
    expected.backward(grad.double())

    sigmoid = torch.empty_like(gate) if keeps_sigmoid else None
    activated = unit.activate(gate, torch.empty_like(gate), sigmoid)
    product = unit.scale(activated, up, torch.empty_like(gate))
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(gate)
    unit.backward(gate, up, activated, grad.clone(), grad_gate, grad_up, sigmoid)
    found = (product, grad_gate, grad_up)
    for ours, exact in zip(found, (expected.detach(), *(leaf.grad for leaf in leaves)), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("by_onednn", BY_ONEDNN)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("load", LOADS)
def test_the_loop_in_float32_is_near_the_formula(
    load: str, unit: str, bias: bool, recompute: bool, kind: type[Desk], by_onednn: bool
) -> None:
    experts = _experts(UNITS[unit], bias, torch.float32, recompute)
    found = _run(_loop(torch.float32, kind, by_onednn), experts, LOADS[load])
    experts.zero_grad()
    exact = _run(_plainly, experts.double(), LOADS[load])
    _compare(found, {name: None if value is None else value.float() for name, value in exact.items()}, 2e-5)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("load", LOADS)
def test_grouped_gemm_equals_the_loop(
    load: str, unit: str, bias: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "_PART", 3)  # rows whose biases' gradients are added up at a time
    experts = _experts(UNITS[unit], bias, torch.float32, recompute)
    found = _run(GROUPED, experts, LOADS[load])
    experts.zero_grad()
    _compare(found, _run(_loop(torch.float32), experts, LOADS[load]), 1e-4)


@pytest.mark.parametrize(
    "node",
    [_loop(torch.float32), *(_loop(torch.float32, kind) for kind in COMPILED), GROUPED],
    ids=["loop", *["compiled loop"] * len(COMPILED), "grouped"],
)
@pytest.mark.parametrize("frozen", ["gate_up", "gate_up_bias", "down", "down_bias", "all"])
def test_of_what_is_frozen_no_gradient_is_made_and_the_rest_is_the_same(frozen: str, node: Any) -> None:
    def made(experts: Experts) -> list[Tensor | None]:
        """What the node's backward returns for its six tensors, before autograd drops what nobody needs."""
        copies = copies_of(torch.tensor(LOADS["uneven"]), 4)
        draw = torch.Generator().manual_seed(2)
        source = torch.randn(5, 16, generator=draw).requires_grad_()
        weights = torch.rand(10, generator=draw).requires_grad_()
        y = node(experts, Rows(source, weights, copies))
        assert y.grad_fn is not None
        with torch.no_grad():
            return list(y.grad_fn.apply(torch.ones_like(y)))[:6]  # type: ignore[attr-defined]  # a Function has it

    experts = _experts(UNITS["gpt_oss"], True, torch.float32)
    right = made(experts)
    names = ["source", "weights", "gate_up", "gate_up_bias", "down", "down_bias"]
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(frozen not in (name, "all"))
    for name, ours, theirs in zip(names, made(experts), right, strict=True):
        assert theirs is not None, name
        if name == frozen or (frozen == "all" and name in names[2:]):
            assert ours is None, name
        else:
            assert ours is not None, name
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("products", "error"), [(torch.bfloat16, 2e-2), (torch.float32, 5e-3)], ids=["bf16", "float32"]
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("load", LOADS)
def test_bf16_is_near_the_formula_whatever_its_products_are_in(
    load: str, unit: str, bias: bool, products: torch.dtype, error: float, kind: type[Desk]
) -> None:
    """Float32 products leave only what is stored to round: a result, or a pre-activation, to 8 bits."""
    found = []
    for recompute in (False, True):
        experts = _experts(UNITS[unit], bias, torch.bfloat16, recompute)
        found.append(_run(_loop(products, kind), experts, LOADS[load]))
    experts.zero_grad()
    right = _run(_plainly, experts.double(), LOADS[load])
    for name, exact in right.items():
        kept, recomputed = found[0][name], found[1][name]
        assert (exact is None) == (kept is None), name
        if exact is None or kept is None or recomputed is None:
            continue
        assert kept.dtype == torch.bfloat16, name
        assert torch.equal(kept, recomputed), name
        assert float((kept.double() - exact).norm()) <= error * float(exact.norm()), name


@pytest.mark.parametrize(
    ("node", "dtype"),
    [
        (_loop(torch.float32), torch.float32),
        pytest.param(_loop(torch.float32, by_onednn=True), torch.float32, marks=needs_onednn),
        (_loop(torch.bfloat16), torch.bfloat16),
        *((_loop(torch.bfloat16, kind), torch.bfloat16) for kind in COMPILED),
        (GROUPED, torch.float32),
    ],
    ids=["loop", "loop by oneDNN", "filled-up loop", *["compiled loop"] * len(COMPILED), "grouped"],
)
def test_choices_that_are_not_made_get_nothing(node: Any, dtype: torch.dtype) -> None:
    experts = _experts(UNITS["gpt_oss"], True, dtype)
    made = torch.tensor([[True, False], [False, False], [True, True], [False, True], [True, True]])
    found = _run(node, experts, LOADS["uneven"], made)
    assert found["y"] is not None
    assert found["weights"] is not None
    assert found["source"] is not None
    assert not found["y"][1].any()
    assert not found["source"][1].any()
    assert not found["weights"][~made].any()
    assert found["weights"][made].all()
    nothing = torch.zeros_like(made)
    experts.zero_grad()
    empty = _run(node, experts, LOADS["uneven"], nothing)
    assert not any(value.any() for value in empty.values() if value is not None)


@pytest.mark.parametrize(
    "node",
    [
        _loop(torch.bfloat16),
        _loop(torch.float32),
        pytest.param(_loop(torch.float32, by_onednn=True), marks=needs_onednn),
        *(_loop(torch.bfloat16, kind) for kind in COMPILED),
        GROUPED,
    ],
    ids=["loop", "loop in float32", "loop by oneDNN", *["compiled loop"] * len(COMPILED), "grouped"],
)
def test_bf16_rounds_each_sum_once(node: Any) -> None:
    """A token whose 64 choices add up to little: sums kept in bf16 would lose most of it."""
    ids = [[e % 4 for e in range(64)]]
    experts = _experts(UNITS["swiglu"], False, torch.bfloat16)
    found = _run(node, experts, ids)
    exact = _run(_loop(torch.float64), experts.double(), ids)
    for name in ("y", "source"):
        ours, right = found[name], exact[name]
        assert ours is not None
        assert right is not None
        assert float((ours.double() - right).norm() / right.norm()) < 1e-2


@pytest.mark.parametrize(
    ("kind", "dtype", "by_onednn", "error"),
    [
        (Desk, torch.float64, False, 1e-12),
        *((kind, torch.float32, False, 1e-5) for kind in COMPILED),
        *(pytest.param(kind, torch.float32, True, 1e-5, marks=needs_onednn) for kind in COMPILED),
    ],
)
def test_several_threads_give_the_same_and_leave_no_trace(
    kind: type[Desk], dtype: torch.dtype, by_onednn: bool, error: float
) -> None:
    experts = _experts(UNITS["gpt_oss"], True, dtype)
    ids = torch.rand(200, 4, generator=torch.Generator().manual_seed(4)).argsort(1)[:, :2].tolist()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):  # more than there are experts
            torch.set_num_threads(threads)
            experts.zero_grad()
            found.append(_run(_loop(dtype, kind, by_onednn), experts, ids))
            assert torch.get_num_threads() == threads
            with torch.inference_mode():
                rows = Rows(
                    torch.ones(2, 16, dtype=dtype), torch.ones(2), copies_of(torch.tensor([[0], [1]]), 4)
                )
                assert experts(rows).is_inference()
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        _compare(other, found[0], error)


def test_a_fault_at_a_desk_is_a_fault() -> None:
    experts = _experts(UNITS["swiglu"], True, torch.float32)
    experts.gate_up_bias = torch.nn.Parameter(torch.ones(4, 15))  # for 16
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        copies = copies_of(torch.tensor([[0], [1]]), 4)
        with pytest.raises(RuntimeError, match="15"):
            experts(Rows(torch.ones(2, 16), torch.ones(2), copies))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_of_what_is_given_does_not_matter(kind: type[Desk]) -> None:
    """Sources, weights and integers from elsewhere; and hooks on what is kept that lay it out anew."""
    experts = _experts(UNITS["swiglu"], False, torch.float32)
    plain = copies_of(torch.tensor([[0, 2], [2, 0], [0, 3]]), 4)
    other = replace(plain, source_of_row_R=plain.source_of_row_R.to(torch.int32))
    draw = torch.Generator().manual_seed(3)
    source, weights = torch.randn(16, 3, generator=draw).t(), torch.rand(6, 2, generator=draw)[:, 1]

    def as_it_is(tensor: Tensor) -> Tensor:
        return tensor

    def by_columns(tensor: Tensor) -> Tensor:
        return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor

    found = []
    for copies, lay, unpack in ((plain, Tensor.contiguous, as_it_is), (other, as_it_is, by_columns)):
        experts.zero_grad()
        x, w = lay(source).detach().requires_grad_(), lay(weights).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(as_it_is, unpack):
            y = _loop(torch.float32, kind)(experts, Rows(x, w, copies))
            y.square().sum().backward()
        found.append({"y": y.detach(), "x": x.grad, "w": w.grad, "gate_up": experts.gate_up.grad})
    _compare(found[1], found[0], 0.0)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"source_MD": torch.ones(1, 16)}, IndexError),
        ({"weights_R": torch.ones(3)}, ValueError),
        ({"weights_R": torch.ones(2, device="meta")}, ValueError),
    ],
    ids=["a source that is not there", "too many weights", "elsewhere"],
)
def test_what_does_not_belong_together_is_refused(change: dict[str, Tensor], error: type[Exception]) -> None:
    """Compiled code would read whatever lies there."""
    rows = Rows(torch.ones(2, 16), torch.ones(2), copies_of(torch.tensor([[0], [1]]), 4))
    experts = _experts(UNITS["swiglu"], False, torch.float32)
    with pytest.raises(error):
        experts(replace(rows, **change))
    experts.gate_up = torch.nn.Parameter(torch.ones(4, 18, 16))
    with pytest.raises(ValueError, match="18"):
        experts(rows)


@pytest.mark.parametrize("threads", [1, 2])
def test_second_derivatives_are_refused_rather_than_wrong(threads: int) -> None:
    """With two threads the experts' part was a constant, in silence; the shared expert's had its graph."""
    config = MoEConfig(num_experts=4, top_k=2, expert_intermediate_size=5, shared_expert_intermediate_size=3)
    layer = SparseMoE(6, config, ExpertLayout(4))
    x = torch.ones(8, 6, requires_grad=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    finally:
        torch.set_num_threads(before)


def test_copies_lie_by_bucket_in_order() -> None:
    ids = torch.tensor([[2, 0], [0, 1], [2, 1]])
    copies: Copies = copies_of(ids, 3, torch.tensor([[True, True], [False, True], [True, True]]))
    assert copies.rows_per_bucket == [1, 2, 2]
    assert copies.source_of_row_R.tolist() == [0, 1, 2, 0, 2]
    assert copies.row_of_choice_MK.tolist() == [[3, 0], [0, 1], [4, 2]]
