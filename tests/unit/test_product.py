"""How products are computed, by what a CPU says of itself, and by what a trial on it says."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from moe.config import MoEConfig
from moe.model.head import Head
from moe.sparse import product
from moe.sparse.copies import copies_of
from moe.sparse.experts import Experts, Rows
from moe.sparse.linear import Linear
from moe.sparse.plan import ExpertLayout
from moe.sparse.product import (
    LEAST_ROWS,
    LEAST_WEIGHT,
    Products,
    has_bf16_units,
    onednn_is_faster,
    product_dtype,
)
from moe.sparse.router import Router
from tests.onednn import BY_ONEDNN, needs_onednn

Multiply = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def untried() -> Iterator[None]:
    onednn_is_faster.cache_clear()
    yield
    onednn_is_faster.cache_clear()


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_vnni": True}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "arm64", "neon": True, "sve": True, "bf16": False}, False),
        ({"architecture": "arm64", "neon": True, "bf16": True}, True),
        ({}, False),
    ],
    ids=["Zen 3", "Skylake", "Zen 4", "Sapphire Rapids", "Graviton 2", "Graviton 3", "unknown"],
)
def test_only_some_processors_multiply_bf16(capabilities: dict[str, object], native: bool) -> None:
    assert has_bf16_units(capabilities) == native


def test_the_processor_here_says_what_it_can() -> None:
    """A name that torch no longer knew would read as no."""
    known = torch.cpu.get_capabilities()
    assert {"avx512_bf16", "amx_bf16"} <= known.keys() or "bf16" in known


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_dtypes_stay_what_they_are(dtype: torch.dtype) -> None:
    assert product_dtype(torch.empty(1, dtype=dtype)) == dtype


def test_bf16_stays_on_other_devices() -> None:
    assert product_dtype(torch.empty(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16
    here = has_bf16_units(torch.cpu.get_capabilities())
    expected = torch.bfloat16 if here else torch.float32
    assert product_dtype(torch.empty(1, dtype=torch.bfloat16)) == expected


@pytest.mark.parametrize("by_onednn", BY_ONEDNN)
def test_products_are_written_and_added(by_onednn: bool) -> None:
    products = Products(torch.float32, by_onednn)
    draw = torch.Generator().manual_seed(1)
    a, b = (
        torch.randn(30, 600, generator=draw).t(),
        torch.randn(50, 30, generator=draw).t(),
    )  # more than two blocks
    exact = a.double() @ b.double()
    out = torch.full((600, 50), torch.nan)
    products.write(a, b, out)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    products.add(a, b, out)
    torch.testing.assert_close(out.double(), 2 * exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products.multiply(a, b).double(), exact, rtol=1e-5, atol=1e-5)
    wide = torch.ones(600, 50, dtype=torch.float64)
    products.add(a, b, wide)
    torch.testing.assert_close(wide, 1 + exact, rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(
    ("onednn_s", "usual_s", "wins"), [(1.0, 2.0, True), (1.0, 1.1, False), (2.0, 1.0, False)]
)
def test_onednn_multiplies_where_it_is_by_far_faster(
    onednn_s: float, usual_s: float, wins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        product, "_seconds", lambda multiply, a, b: usual_s if multiply is torch.mm else onednn_s
    )
    threads = torch.get_num_threads()
    like, weight = torch.empty(1), torch.empty(LEAST_WEIGHT)
    assert Products.of(like, LEAST_ROWS, weight) == Products(torch.float32, by_onednn=wins)
    assert torch.get_num_threads() == threads
    assert Products.of(like, LEAST_ROWS - 1, weight) == Products(torch.float32)
    assert Products.of(like, LEAST_ROWS, weight[1:]) == Products(torch.float32)
    assert Products.of(like.double(), LEAST_ROWS, weight) == Products(torch.float64)
    assert Products.of(like.to("meta"), LEAST_ROWS, weight) == Products(torch.float32)


def _wrong(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) * 1.01


def _wrong_if_transposed(a: Tensor, b: Tensor) -> Tensor:
    return a @ b if b.is_contiguous() else _wrong(a, b)


def _failing(a: Tensor, b: Tensor) -> Tensor:
    raise RuntimeError("could not create a primitive")


def _absent(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._no_such_operation(a, b)


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("way", [_wrong, _wrong_if_transposed, _failing, _absent])
def test_onednn_does_not_multiply_where_it_cannot(way: Multiply, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_seconds", lambda multiply, a, b: 1.0 if multiply is torch.mm else 0.0)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(product, "_by_onednn", lambda a, b: a @ b)
    assert onednn_is_faster()
    onednn_is_faster.cache_clear()
    monkeypatch.setattr(product, "_by_onednn", way)
    assert not onednn_is_faster()


@pytest.mark.usefixtures("untried")
def test_it_does_not_where_torch_has_it_not_or_may_not_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_wins_a_trial", lambda transposed: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    like, weight = torch.empty(1), torch.empty(LEAST_WEIGHT)
    assert Products.of(like, LEAST_ROWS, weight).by_onednn
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        assert not Products.of(like, LEAST_ROWS, weight).by_onednn
    finally:
        torch.backends.mkldnn.enabled = before
    onednn_is_faster.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not Products.of(like, LEAST_ROWS, weight).by_onednn


@needs_onednn
@pytest.mark.usefixtures("untried")
def test_the_trial_is_in_float32_under_autocast_too(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = []

    def seconds(multiply: Multiply, a: Tensor, b: Tensor) -> float:
        usual.append(multiply(a, b).dtype)
        return 1.0

    monkeypatch.setattr(product, "_seconds", seconds)
    with torch.autocast("cpu", torch.bfloat16):
        onednn_is_faster()
    assert set(usual) == {torch.float32}


@needs_onednn
@pytest.mark.usefixtures("untried")
def test_the_trial_here_says_the_same_again() -> None:
    first = onednn_is_faster()
    onednn_is_faster.cache_clear()
    assert onednn_is_faster() == first


def _through_linear(x: Tensor) -> Tensor:
    return Linear(256, 256)(x).sum()


def _through_logits(x: Tensor) -> Tensor:
    return Head(256, 256)(x).sum()


def _through_loss(x: Tensor) -> Tensor:
    return Head(256, 256)(x, torch.zeros(len(x), dtype=torch.int64))


def _through_router(x: Tensor) -> Tensor:
    config = MoEConfig(num_experts=128, top_k=2, expert_intermediate_size=8)
    return Router(256, config)(x).weights_TK.square().sum()


def _through_experts(x: Tensor) -> Tensor:
    copies = copies_of((torch.arange(len(x)) % 2).unsqueeze(1), 2)  # half of the rows for each
    return Experts(256, 256, ExpertLayout(2))(Rows(x, torch.ones(len(x)), copies)).sum()


@needs_onednn
@pytest.mark.parametrize(
    ("through", "rows", "products"),
    [
        (_through_linear, LEAST_ROWS, 3),
        (_through_logits, LEAST_ROWS, 3),
        (_through_loss, LEAST_ROWS, 3),
        (_through_router, LEAST_ROWS, 3),
        (_through_experts, 2 * LEAST_ROWS, 2 * (2 + 2 + 3)),  # the last of which are blocks of two gradients
    ],
)
def test_big_products_are_onednns_and_small_ones_are_not(
    through: Callable[[Tensor], Tensor], rows: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply, calls = product._by_onednn, []

    def spy(a: Tensor, b: Tensor) -> Tensor:
        calls.append((a.shape, b.shape))
        return multiply(a, b)

    monkeypatch.setattr(product, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(product, "_by_onednn", spy)
    through(torch.ones(rows - 2, 256, requires_grad=True)).backward()
    assert not calls
    through(torch.ones(rows, 256, requires_grad=True)).backward()
    assert len(calls) == products
