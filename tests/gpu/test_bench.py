"""The sparse layer on CUDA at real models' shapes: right, near the dense limit, ahead of torch's grouped GEMM."""

import time
from dataclasses import replace

import pytest
import torch

from moe.bench.case import make_case
from moe.bench.compare import compare
from moe.bench.memory import peak_extra_bytes
from moe.bench.peers import select
from moe.bench.problem import PRESETS, RoutingKind
from moe.bench.step import Clock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none here"),
]

TOKENS = 16_384
GOAL = 1.15
"""Most of the dense limit's time."""


@pytest.mark.parametrize("routing", ["forced", "real"])
@pytest.mark.parametrize("preset", ["olmoe", "qwen3-30b-a3b"])
def test_the_layer_is_right_ahead_and_near_the_limit(preset: str, routing: RoutingKind) -> None:
    shape = replace(PRESETS[preset], tokens=TOKENS)
    case = make_case(shape, dtype="bf16", device="cuda", routing=routing)
    report = compare(case, select(["turnout", "grouped_mm", "AutoEP"], []))
    assert [one for one in report.left_out if one.failed] == []
    assert [line for line in report.lines if not line.is_right("bf16")] == []
    ratio = {line.name: line.ratio for line in report.lines}
    assert ratio["turnout"] < min(ratio["HF grouped_mm"], ratio["DeepSpeed grouped_mm"]), ratio
    assert ratio["turnout"] <= GOAL, ratio


def test_peak_of_a_plain_matmul_is_its_output_and_two_gradients() -> None:
    draw = {"device": "cuda", "requires_grad": True}
    x, weight = torch.randn(8192, 4096, **draw), torch.randn(4096, 8192, **draw)
    grad = torch.ones(8192, 8192, device="cuda")

    def work() -> torch.Tensor:
        y = x @ weight
        y.backward(grad)
        return y

    peak = peak_extra_bytes(work, x.device)[1]
    assert peak == pytest.approx(4 * (8192 * 8192 + 2 * 8192 * 4096), rel=0.1)  # and the library's workspace


def test_the_clock_agrees_with_the_wall() -> None:
    a = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    began, clock = time.perf_counter(), Clock(a.device)
    clock.mark()
    for _ in range(20):
        a = torch.mm(a, a).clamp(-1, 1)
    clock.mark()
    clock.mark()
    times = clock.times()
    assert times.total_s == pytest.approx(time.perf_counter() - began, rel=0.1)
