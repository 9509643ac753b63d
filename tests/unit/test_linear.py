"""Linear maps and the head, by every way there is to multiply, beside float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.model import head
from moe.model.head import Head
from moe.sparse.linear import Linear, LinearFunction
from moe.sparse.product import Products
from tests.onednn import BY_ONEDNN, needs_onednn

ROUNDED_ONCE = 2**-8
"""Largest relative error of a number rounded to bf16."""


def _draw(*shape: int) -> Tensor:
    """Float64 numbers that bf16 holds."""
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=draw).bfloat16().double()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(9, 6), (2, 5, 6), (0, 6)], ids=["flat", "batched", "empty"])
def test_its_gradient_is_right(shape: tuple[int, ...], bias: bool) -> None:
    arguments = [_draw(*shape), _draw(4, 6), _draw(4) if bias else None]
    leaves = [None if value is None else value.requires_grad_() for value in arguments]
    assert torch.autograd.gradcheck(
        lambda *inputs: LinearFunction.apply(*inputs, Products(torch.float64)), leaves
    )


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    leaves = [_draw(9, 6), _draw(4, 6), _draw(4)]
    for place, leaf in enumerate(leaves):
        leaf.requires_grad_(place != frozen)
    LinearFunction.apply(*leaves, Products(torch.float64)).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [place == frozen for place in range(3)]


@pytest.mark.parametrize(("frozen", "kept"), [(0, [(9, 6)]), (1, [(4, 6)]), (None, [(9, 6), (4, 6)])])
def test_nothing_is_kept_for_a_gradient_that_nobody_needs(
    frozen: int | None, kept: list[tuple[int, ...]]
) -> None:
    leaves = [_draw(9, 6), _draw(4, 6)]
    for place, leaf in enumerate(leaves):
        leaf.requires_grad_(place != frozen)
    found = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: found.append(tuple(tensor.shape)), lambda _: None
    ):
        LinearFunction.apply(*leaves, None, Products(torch.float64))
    assert found == kept


@pytest.mark.parametrize("by_onednn", BY_ONEDNN)
def test_it_can_be_differentiated_twice(by_onednn: bool) -> None:
    x, weight = _draw(9, 6).float().requires_grad_(), _draw(4, 6).float().requires_grad_()
    found = []
    for y in (LinearFunction.apply(x, weight, None, Products(torch.float32, by_onednn)), F.linear(x, weight)):
        (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), (x, weight)))
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-3)


def test_what_torch_refuses_or_casts_it_still_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Products, "of", lambda like, rows, weight: Products(torch.float32, by_onednn=True))
    layer = Linear(6, 4)
    with pytest.raises(RuntimeError, match="dtype"):
        layer.bfloat16()(torch.ones(9, 6))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(torch.ones(9, 6)).dtype == torch.bfloat16


@needs_onednn
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(300, 6), (2, 5, 6), (6,)], ids=["flat", "batched", "one"])
def test_by_onednn_it_is_near_float64(shape: tuple[int, ...], bias: bool) -> None:
    leaves = [_draw(*shape).requires_grad_(), _draw(4, 6).requires_grad_(), _draw(4).requires_grad_()]
    narrow = [leaf.detach().float().requires_grad_() for leaf in leaves]
    arguments = narrow if bias else [*narrow[:2], None]
    y = LinearFunction.apply(*arguments, Products(torch.float32, by_onednn=True))
    y_right = F.linear(*leaves[:2], leaves[2] if bias else None)
    grad = _draw(*y_right.shape)
    y_right.backward(grad)
    y.backward(grad.float())
    torch.testing.assert_close(y.double(), y_right, rtol=1e-5, atol=1e-5)
    for right, ours in zip(leaves, narrow, strict=True):
        assert (right.grad is None) == (ours.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad.double(), right.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
def test_bf16_is_rounded_once_where_products_are_wider(
    products: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Products, "of", lambda like, rows, weight: Products(products))
    layer = Linear(64, 48).double()
    x, grad = _draw(200, 64).requires_grad_(), _draw(200, 48)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(_draw(*parameter.shape))
    y_right = F.linear(x, layer.weight, layer.bias)
    y_right.backward(grad)
    right = [y_right.detach(), x.grad, layer.weight.grad, layer.bias.grad]
    layer.zero_grad()
    narrow, wanted = layer.bfloat16(), x.detach().bfloat16().requires_grad_()
    y = narrow(wanted)
    y.backward(grad.bfloat16())
    wide = y.grad_fn is not None and "LinearFunction" in type(y.grad_fn).__name__
    assert wide == (products == torch.float32)
    found = [y.detach(), wanted.grad, narrow.weight.grad, narrow.bias.grad]
    for ours, exact in zip(found, right, strict=True):
        assert ours is not None
        assert exact is not None
        assert ours.dtype == torch.bfloat16
        error = (ours.double() - exact).abs()
        # Sums that nearly cancel are float32's to round.
        assert bool((error <= ROUNDED_ONCE * exact.abs() + 1e-4).all())


@pytest.mark.parametrize(
    ("dtype", "products", "error"),
    [
        (torch.bfloat16, Products(torch.bfloat16), 2e-2),
        (torch.bfloat16, Products(torch.float32), 3e-3),
        pytest.param(torch.bfloat16, Products(torch.float32, by_onednn=True), 3e-3, marks=needs_onednn),
        (torch.float32, Products(torch.float32), 1e-5),
        pytest.param(torch.float32, Products(torch.float32, by_onednn=True), 1e-5, marks=needs_onednn),
    ],
)
def test_the_head_is_near_float64(
    dtype: torch.dtype, products: Products, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Products, "of", lambda like, rows, weight: products)
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 7 * 50)  # seven tokens at a time
    labels = torch.randint(50, (40,), generator=torch.Generator().manual_seed(3))
    losses, grads = [], []
    for kind in (torch.float64, dtype):
        layer = Head(16, 50).to(kind)
        torch.nn.init.zeros_(layer.weight).data.copy_(_draw(50, 16))
        h = _draw(40, 16).to(kind).requires_grad_()
        exact = kind == torch.float64
        loss = F.cross_entropy(h @ layer.weight.t(), labels, reduction="sum") if exact else layer(h, labels)
        loss.backward()
        losses.append(float(loss.detach()))
        grads.append((h.grad, layer.weight.grad))
    assert losses[1] == pytest.approx(losses[0], rel=error)
    for right, ours in zip(*grads, strict=True):
        assert right is not None
        assert ours is not None
        assert ours.dtype == dtype
        assert float((ours.double() - right).norm() / right.norm()) < error
