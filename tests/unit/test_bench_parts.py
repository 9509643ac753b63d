"""What the benchmark rests on: the right answer, equal loads, memory by the byte, ratios that no drift moves."""

import time
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.bench import compare, step
from moe.bench.compare import _Checked, _is_slow, _line
from moe.bench.memory import peak_extra_bytes
from moe.bench.peers import LIMIT, OURS, Contender
from moe.bench.peers.limit import Dense, DenseBlock
from moe.bench.peers.ours import Ours
from moe.bench.problem import PRESETS, Answer, Problem, RoutingKind, Shape, solve
from moe.bench.step import Times

SHAPE = Shape(tokens=48, hidden=16, inner=8, experts=6, top_k=3)
CPU = torch.device("cpu")


def by_masks(problem: Problem, ids_TK: Tensor) -> Answer:
    """Every expert on every token, unchosen ones times zero; torch's own backward, float64."""
    names = ("x_TD", "router_ED", "gate_EFD", "up_EFD", "down_EDF")
    x, router, gate, up, down = leaves = [
        getattr(problem, n).detach().double().requires_grad_() for n in names
    ]
    chosen_TE = torch.zeros(len(x), problem.shape.experts, dtype=torch.float64).scatter(1, ids_TK, 1.0)
    weights_TE = torch.softmax(x @ router.t(), dim=-1) * chosen_TE
    weights_TE = weights_TE / weights_TE.sum(-1, keepdim=True)
    h_TEF = F.silu(torch.einsum("td,efd->tef", x, gate)) * torch.einsum("td,efd->tef", x, up)
    y = torch.einsum("tef,edf,te->td", h_TEF, down, weights_TE)
    y.backward(problem.grad_TD.double())
    return Answer(y.detach(), *(leaf.grad for leaf in leaves))


@pytest.mark.parametrize("routing", ["real", "forced"])
def test_the_right_answer_is_that_of_masked_dense_experts(routing: RoutingKind) -> None:
    problem = Problem.draw(SHAPE, torch.float64, routing=routing)
    assert max(solve(problem).errors(by_masks(problem, problem.choices())).values()) < 1e-12
    others_TK = torch.tensor([[0, 2, 5]]).expand(SHAPE.tokens, -1)  # and experts without a token
    assert max(solve(problem, others_TK).errors(by_masks(problem, others_TK)).values()) < 1e-12


def test_forced_routing_gives_every_expert_the_same_load() -> None:
    problem = Problem.draw(SHAPE, torch.float32, routing="forced")
    ids_TK = problem.choices()
    assert torch.bincount(ids_TK.flatten()).tolist() == [24] * 6
    assert all(len(set(row)) == SHAPE.top_k for row in ids_TK.tolist())
    ours_TK = Ours(problem).choices(problem.x_TD)  # in another order, as even
    assert torch.bincount(ours_TK.flatten()).tolist() == [24] * 6


def test_real_routing_does_not() -> None:
    problem = Problem.draw(SHAPE, torch.float32)
    assert len(set(torch.bincount(problem.choices().flatten()).tolist())) > 1


def test_flops_are_those_of_the_experts_matmuls() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    problem = Problem.draw(SHAPE, torch.float32)
    limit = LIMIT.build(problem)
    with FlopCounterMode(display=False) as counted:
        step.step(limit, step.leaf(problem, limit), problem.grad_TD)
    assert counted.get_total_flops() == SHAPE.flops


def test_the_dense_block_is_the_limits_layer() -> None:
    problem = Problem.draw(SHAPE, torch.float32)
    answers = []
    for contender in (Dense(problem), DenseBlock(problem)):
        x_TD = step.leaf(problem, contender)
        y_TD = step.step(contender, x_TD, problem.grad_TD)
        gate_up_down = torch.cat([parameter.grad.flatten() for parameter in contender.parameters()])
        answers.append((y_TD, x_TD.grad, gate_up_down))
    for limit, ours in zip(*answers, strict=True):
        torch.testing.assert_close(ours, limit)


def test_presets_are_the_published_sizes() -> None:
    sizes = {name: (s.hidden, s.inner, s.experts, s.top_k) for name, s in PRESETS.items()}
    assert sizes["olmoe"] == (2048, 1024, 64, 8)
    assert sizes["qwen3-30b-a3b"] == (2048, 768, 128, 8)


class Matmul(Contender):
    """y = x W."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_peak_of_a_plain_matmul_is_its_output_and_two_gradients() -> None:
    layer, x, grad = Matmul(32, 16), torch.randn(64, 32, requires_grad=True), torch.randn(64, 16)
    for _ in range(2):  # the second with everything of the first released
        layer.weight.grad = x.grad = None
        y, peak = peak_extra_bytes(lambda: step.step(layer, x, grad), CPU)
        assert peak == 4 * (64 * 16 + 32 * 16 + 64 * 32)
    assert torch.equal(y, (x @ layer.weight).detach())


def test_peak_counts_what_is_held_at_once() -> None:
    before = torch.zeros(1000)

    def work() -> Tensor:
        torch.zeros(4000)  # gone at once
        kept = torch.zeros(1000)
        both = torch.zeros(2000) + torch.zeros(2000)  # three of 2000 for a moment
        return kept + both[:1000] + before

    assert peak_extra_bytes(work, CPU)[1] == 4 * 7000


def test_peak_is_taken_on_one_thread_and_leaves_no_trace() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert peak_extra_bytes(torch.get_num_threads, CPU)[0] == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_times_are_means_of_spans_between_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count(step=1.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) ** 2)
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    clock = step.Clock(CPU)
    for _ in range(6):
        clock.mark()
    # 0 1 4 | 9 16 25
    assert clock.times() == Times(forward_s=(1 + 7) / 2, total_s=(4 + 16) / 2, cpu_s=0.0)


def test_ratios_are_of_one_round_so_that_drift_moves_none() -> None:
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    limit = {n: Times(forward_s=0.5 * d, total_s=d, cpu_s=d) for n, d in enumerate(drift)}
    ours = {
        n: Times(forward_s=0.6 * d, total_s=r * d, cpu_s=1.1 * d)
        for n, (d, r) in enumerate(zip(drift, [1.2, 1.4, 1.3, 1.5, 1.1], strict=True))
    }
    one = _Checked(OURS, Contender(), {"output": 1e-7, "input": 2e-7}, 0.0, 1024)
    line = _line(one, SHAPE, {"dense limit": limit, "turnout": ours})
    assert (line.ratio, line.ratio_quartiles) == (pytest.approx(1.3), pytest.approx((1.2, 1.4)))
    assert line.error == 2e-7
    assert line.cpu_ratio == pytest.approx(1.1)
    assert line.total_s == pytest.approx(1.3 * 4.0)
    assert line.flops_per_s == pytest.approx(SHAPE.flops / 5.2)


def test_the_slow_are_timed_in_few_rounds() -> None:
    limit = {n: Times(0.5, 1.0, 1.0) for n in range(5)}
    times = {n: Times(2.0, 4.0, 4.0) for n in range(compare.SLOW_ROUNDS)}
    assert _is_slow(times, limit, steps=1)
    assert not _is_slow({0: times[0]}, limit, steps=1)
    assert not _is_slow({n: Times(1.0, 2.9, 2.9) for n in times}, limit, steps=1)
    tenth = {n: Times(0.05, 0.1, 0.1) for n in range(5)}
    assert not _is_slow({n: Times(0.2, 0.4, 0.4) for n in times}, tenth, steps=1)
    assert _is_slow({n: Times(0.2, 0.4, 0.4) for n in times}, tenth, steps=10)
