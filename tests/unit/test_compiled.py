"""rows.cpp beside torch in float64: every pass by itself, at widths that fill no vector, and far from zero."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe import log
from moe.sparse import kernels
from moe.sparse.activation import GatedUnit
from moe.sparse.compiled import CompiledDesk, desk_for
from moe.sparse.desk import Desk
from moe.sparse.product import Products
from tests.compiled import COMPILED

UNITS = [GatedUnit(), GatedUnit(limit=0.7), GatedUnit(1.702, 1.0, 7.0), GatedUnit(2.6, 0.5)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
ERROR = {torch.float32: 3e-6, torch.bfloat16: 2**-8}

needs_compiler = pytest.mark.skipif(not COMPILED, reason="rows.cpp cannot be compiled here: no C++ compiler")


def _desk(rows: int, width: int, inner: int, source: torch.dtype, products: torch.dtype) -> CompiledDesk:
    desk = CompiledDesk(torch.zeros(9, width, dtype=source), rows, inner, Products(products), ())
    desk.rows = rows
    return desk


def _near(ours: Tensor, exact: Tensor, size: Tensor | None = None, farthest: float = 0.0) -> None:
    """Within a few roundings of each number, or of the sizes of what it is a sum of.

    `farthest`: the greatest number of which an exponential is taken, whose own rounding is an error of the result.
    """
    error = (ours.double() - exact).abs()
    bound = (ERROR[ours.dtype] + 2**-23 * farthest) * (exact.abs() if size is None else size)
    assert bool((error <= bound + 1e-30).all()), float((error - bound).max())


@needs_compiler
@pytest.mark.parametrize("dtypes", DTYPES)
@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 70), st.integers(0, 2**31))
def test_rows_are_copied_and_added_up(
    dtypes: tuple[torch.dtype, torch.dtype], rows: int, width: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    desk = _desk(rows, width, 1, *dtypes)
    of = torch.randn(9, width, generator=draw).to(dtypes[0])
    source = torch.randint(9, (rows,), generator=draw)
    copies = desk.copies("x", of, source)
    assert copies.dtype == dtypes[1]
    assert torch.equal(copies, of[source].to(dtypes[1]))
    for _ in range(2):
        desk.add(source, copies)
    sums = torch.zeros(9, width, dtype=torch.float64).index_add_(0, source, 2 * copies.double())
    size = torch.zeros_like(sums).index_add_(0, source, 2 * copies.double().abs())
    assert desk.sums_MD.dtype == torch.float32
    _near(desk.sums_MD, sums, size)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", UNITS)
@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([0.1, 1.0, 30.0]), st.integers(0, 2**31))
def test_the_unit_and_its_gradient(
    unit: GatedUnit, dtype: torch.dtype, rows: int, inner: int, spread: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    gate_up = (spread * torch.randn(rows, 2 * inner, generator=draw)).to(dtype)
    weight = torch.rand(rows, generator=draw)
    grad = torch.randn(rows, inner, generator=draw).to(dtype)
    both, w = gate_up.double().requires_grad_(), weight.double().requires_grad_()
    exact = unit(both) * w.unsqueeze(1)
    exact.backward(grad.double())
    assert both.grad is not None
    assert w.grad is not None

    desk = _desk(rows, 1, inner, dtype, dtype)
    out = desk.activate(unit, gate_up, weight).clone()
    grad_weight = torch.empty(rows)
    again, grad_both = desk.differentiate(unit, gate_up, weight, grad.clone(), grad_weight)
    assert torch.equal(out, again)
    exact = exact.detach()
    farthest = unit.alpha * float(gate_up.abs().max())
    _near(out, exact, farthest=farthest)
    # A slope may be near 0 where its terms are not.
    gate, up = gate_up.double().abs().chunk(2, dim=1)
    upstream = (weight.unsqueeze(1) * grad).double().abs()
    terms = (up + unit.offset) * (1 + unit.alpha * gate)
    _near(grad_both, both.grad, torch.cat([upstream * terms, upstream * gate], 1), farthest)
    _near(grad_weight, w.grad, (unit(both.detach()) * grad).abs().sum(1), farthest)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_or_has_no_end_stays_so(dtype: torch.dtype) -> None:
    bad = torch.tensor([[float("nan"), 1.0, 1.0, float("inf"), -float("inf"), 1.0]], dtype=dtype)
    up = torch.tensor([[1.0, float("nan"), float("inf"), 1.0, 1.0, 1.0]], dtype=dtype)
    desk = _desk(1, 1, 6, dtype, dtype)
    gate_up, one = torch.cat([bad, up], 1), torch.ones(1)
    for unit in (GatedUnit(), GatedUnit(limit=7.0)):
        out = desk.activate(unit, gate_up, one)
        torch.testing.assert_close(out.float(), unit(gate_up.float()), rtol=2**-8, atol=0, equal_nan=True)
        grad_weight = torch.empty(1)
        _, grad_both = desk.differentiate(unit, gate_up, one, torch.ones(1, 6).to(dtype), grad_weight)
        assert grad_weight.isnan()
        assert grad_both[0, 0].isnan()
        assert grad_both[0, 5].isfinite()


@needs_compiler
@pytest.mark.parametrize("bits", [range(0, 2**32, 65521), range(0x3F800000, 0x3F820000)])
def test_bf16_is_rounded_as_torch_does(bits: range) -> None:
    numbers = torch.tensor(list(bits), dtype=torch.int64).to(torch.int32).view(torch.float32)
    numbers = numbers[(numbers.abs() < 1e30) & (numbers.abs() > 1e-30)]
    # sigmoid(100) is 1: the output is 100 * up, with up = x / 100 rounded alike in both.
    gate = torch.full_like(numbers, 100.0)
    desk = CompiledDesk(torch.zeros(1, 1), 1, len(numbers), Products(torch.float32), ())
    desk.rows = 1
    product = desk.activate(GatedUnit(), torch.cat([gate, numbers]).unsqueeze(0), torch.ones(1))
    narrow = numbers.bfloat16()
    rounded = _desk(1, 1, len(numbers), torch.bfloat16, torch.bfloat16)
    out = rounded.activate(GatedUnit(), torch.cat([gate.bfloat16(), narrow]).unsqueeze(0), torch.ones(1))
    expected = (100 * narrow.float()).bfloat16()
    assert torch.equal(out[0], expected)
    assert torch.equal(product[0], 100 * numbers)


@needs_compiler
def test_who_gets_a_compiled_desk() -> None:
    for source, products in DTYPES:
        assert desk_for(torch.empty(1, dtype=source), products) is CompiledDesk
    assert desk_for(torch.empty(1, dtype=torch.float64), torch.float64) is Desk
    assert desk_for(torch.empty(1, dtype=torch.float16), torch.float16) is Desk
    assert desk_for(torch.empty(1, device="meta"), torch.float32) is Desk


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "turnout"


_fresh = kernels.library.__wrapped__
"""As a process finds it that has not asked yet."""


@needs_compiler
def test_it_is_compiled_once_for_all_who_come(home: Path) -> None:
    found: list[Any] = []
    several = [threading.Thread(target=lambda: found.append(_fresh())) for _ in range(4)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    assert len(found) == 4
    assert None not in found
    (made,) = home.iterdir()  # nothing half made beside it
    before = made.stat()
    assert _fresh() is not None
    assert made.stat() == before


@needs_compiler
def test_other_flags_or_another_processor_get_their_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _fresh() is not None
    monkeypatch.setattr(kernels, "_processor", lambda: "another")
    assert _fresh() is not None
    monkeypatch.setenv("CXX", "c++ -DSOMETHING")
    assert _fresh() is not None
    assert len(list(home.iterdir())) == 3


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("no-such-compiler", "there is no C++ compiler (no-such-compiler)"),
        ("false", "false failed: exit code 1"),
        ("c++ --no-such-flag", "unrecognized command-line option '--no-such-flag'"),
        ("c++ 'unclosed", "No closing quotation"),
        ("c++ -Dfloat=nonsense", "error: "),
    ],
)
def test_without_a_compiler_torch_does_it_and_one_sentence_says_so(
    compiler: str, why: str, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if compiler.startswith("c++") and not COMPILED:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setattr(log.get(), "propagate", True)
    with caplog.at_level("WARNING", logger=log.LOGGER_NAME):
        assert _fresh() is None
    (sentence,) = {record.getMessage() for record in caplog.records}
    assert why in sentence
    assert "CXX" in sentence
    monkeypatch.setattr(kernels, "library", _fresh)
    assert desk_for(torch.empty(1), torch.float32) is Desk


@needs_compiler
@pytest.mark.parametrize("why", ["a file is there", "nobody has a home"])
def test_it_is_compiled_anew_where_nothing_can_be_kept(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "a file is there":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    assert _fresh() is not None


@needs_compiler
@pytest.mark.parametrize("liberty", ["-ffast-math", "-Ofast"])
def test_a_compilers_own_habits_change_no_number(
    liberty: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", f"c++ {liberty}")
    found = _fresh()
    assert found is not None
    monkeypatch.setattr(kernels, "library", lambda: found)
    test_what_is_no_number_or_has_no_end_stays_so(torch.float32)
    test_what_is_no_number_or_has_no_end_stays_so(torch.bfloat16)


@needs_compiler
def test_code_that_computes_something_else_is_not_used(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = home.parent / "rows.cpp"
    wrong.write_text(kernels.SOURCE.read_text().replace("1.0f / 720", "1.1f"))
    monkeypatch.setattr(kernels, "SOURCE", wrong)
    monkeypatch.setattr(log.get(), "propagate", True)
    with caplog.at_level("WARNING", logger=log.LOGGER_NAME):
        assert _fresh() is None
    assert "computes something else" in caplog.text


@needs_compiler
def test_a_damaged_library_is_no_fault(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In another process, since this one may have it loaded."""
    assert _fresh() is not None
    (made,) = home.iterdir()
    made.unlink()
    made.write_bytes(b"\x7fELF" + b"\0" * 100)
    code = "from moe.sparse import kernels; assert kernels.library() is not None"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
