"""Contenders on one problem -> their lines: numbers checked, memory measured, times taken in turn.

Ratios count, not seconds: every round runs each contender once, in an order of its own, and a ratio is a time over
the dense limit's in the same round, so that what disturbs the machine disturbs all.
"""

import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from moe import log, seed
from moe.bench.case import DTYPES, Case
from moe.bench.memory import peak_extra_bytes
from moe.bench.peers import LIMIT, OURS, Contender, Entry, Unavailable
from moe.bench.problem import Answer, Problem, Shape, solve
from moe.bench.step import Times, leaf, matmul_seconds, step, timed
from moe.errors import ConfigError

BOUND = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative error (Frobenius) of an answer that counts as right."""

MOST_OTHER_CHOICES = 0.1
"""Share of choices in which a router may differ from one in float32: near-ties, where it rounds to bf16."""

SLOW_ROUNDS, SLOW_RATIO, SLOW_S = 2, 3.0, 2.0
"""A peer that takes over SLOW_RATIO times as long as the limit, and SLOW_S seconds, is timed in so many rounds."""

_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Line:
    """What one contender did. Times are medians over rounds."""

    name: str
    version: str
    error: float | None
    """Largest of `errors`; None for dense layers, which solve another problem."""
    errors: dict[str, float]
    """Relative (Frobenius) against float64: of the output and the gradients of the input and each weight."""
    other_choices: float
    """Share of the choices in which its own router differs from float32's, or that are not dealt evenly where routing
    is forced; `error` is on its own choices."""
    rounds: int
    forward_s: float
    total_s: float
    flops_per_s: float
    ratio: float
    """Time over the dense limit's, median of the rounds' ratios."""
    ratio_quartiles: tuple[float, float]
    cpu_ratio: float
    """The same of processor time."""
    peak_extra_bytes: int

    def is_right(self, dtype: str) -> bool:
        return self.error is None or (self.error <= BOUND[dtype] and self.other_choices <= MOST_OTHER_CHOICES)


@dataclass(frozen=True)
class LeftOut:
    """Who is not in the table, and why."""

    name: str
    reason: str
    failed: bool
    """Whether it should have run."""


@dataclass(frozen=True)
class Report:
    """All lines, the fastest first."""

    lines: list[Line]
    left_out: list[LeftOut]
    matmul_flops_per_s: float
    """Of a plain big matmul in the same rounds."""


@dataclass(frozen=True)
class _Checked:
    entry: Entry
    contender: Contender
    errors: dict[str, float]
    other_choices: float
    peak_extra_bytes: int


def compare(case: Case, entries: Sequence[Entry]) -> Report:
    """Check every contender's numbers, then time them in turn. `entries` hold the dense limit.

    Raises `ConfigError` if memory is short for what all are given.
    """
    dtype = DTYPES[case.dtype]
    try:
        problem = Problem.draw(case.shape, dtype, device=case.device, routing=case.routing)
    except RuntimeError as error:  # torch's allocator says no
        raise ConfigError(
            f"the layer and its tokens do not fit in memory ({str(error).partition(chr(10))[0]}). Use fewer --tokens, "
            f"or a smaller --shape."
        ) from None
    matmul_seconds(64, case.device, dtype)  # libraries take workspaces before anybody's memory is measured
    log.get().info("solving in float64")
    right = solve(problem)
    checked: list[_Checked] = []
    left_out: list[LeftOut] = []
    for entry in entries:
        log.get().info("checking %s", entry.name)
        try:
            checked.append(_check(entry, problem, right))
        except Unavailable as reason:
            left_out.append(LeftOut(entry.name, f"unavailable: {reason}", failed=False))
        except Exception as error:
            if entry is LIMIT:
                raise
            log.get().warning("%s failed", entry.name, exc_info=True)
            what = f"{type(error).__name__}: {error}".partition("\n")[0]
            left_out.append(LeftOut(entry.name, f"failed: {what}", failed=True))
    del right
    gc.collect()
    times, matmuls = _race(case, checked, problem)
    size = _matmul_size(case.device)
    return Report(
        lines=sorted((_line(one, case.shape, times) for one in checked), key=lambda line: line.ratio),
        left_out=left_out,
        matmul_flops_per_s=2 * size**3 / statistics.median(matmuls),
    )


def _check(entry: Entry, problem: Problem, right: Answer) -> _Checked:
    """One step of a contender that has just been built, so that what it keeps for later steps counts as memory."""
    contender = entry.build(problem)
    x_TD = leaf(problem, contender)
    y_TD, peak = peak_extra_bytes(lambda: step(contender, x_TD, problem.grad_TD), problem.x_TD.device)
    grads = contender.grads()
    if grads is None:
        return _Checked(entry, contender, {}, 0.0, peak)
    assert x_TD.grad is not None
    answer = Answer(y_TD, x_TD.grad, *grads)
    contender.zero_grad(set_to_none=True)
    with torch.no_grad():
        ids_TK = contender.choices(problem.x_TD)
    other = 0.0 if ids_TK is None else _share_of_others(ids_TK, problem.choices(), problem.shape.experts)
    if ids_TK is not None and other:
        right = solve(problem, ids_TK)
        if problem.routing == "forced":  # any even deal will do
            other = _imbalance(ids_TK, problem.shape.experts)
    return _Checked(entry, contender, answer.errors(right), other, peak)


def _share_of_others(ids_TK: Tensor, expected_TK: Tensor, num_experts: int) -> float:
    """Share of a token's choices that are not among the expected ones."""
    expected_TE = torch.zeros(len(ids_TK), num_experts, dtype=torch.bool, device=ids_TK.device)
    expected_TE.scatter_(1, expected_TK, True)
    return 1.0 - float(expected_TE.gather(1, ids_TK.long()).double().mean())


def _imbalance(ids_TK: Tensor, num_experts: int) -> float:
    """Share of the choices that would have to change for equal loads."""
    loads_E = torch.bincount(ids_TK.flatten(), minlength=num_experts).double()
    return float((loads_E - loads_E.mean()).abs().sum() / (2 * loads_E.sum()))


def _race(
    case: Case, checked: Sequence[_Checked], problem: Problem
) -> tuple[dict[str, dict[int, Times]], list[float]]:
    """({contender: {round: times}}, seconds of plain matmuls by round)."""
    size, dtype = _matmul_size(case.device), DTYPES[case.dtype]
    times: dict[str, dict[int, Times]] = {one.entry.name: {} for one in checked}
    matmuls = []
    rounds = range(-case.warmup, case.rounds)
    for number in track(rounds, description="rounds", console=Console(stderr=True), transient=True):
        order = torch.randperm(len(checked), generator=seed.stream("bench order", number)).tolist()
        batch = problem.with_input(number) if case.batches == "new" else problem
        for one in (checked[place] for place in order):
            if one.entry is not OURS and _is_slow(times[one.entry.name], times[LIMIT.name], case.steps):
                continue
            taken = timed(one.contender, batch, case.steps)
            if number >= 0:
                times[one.entry.name][number] = taken
        if number >= 0:
            matmuls.append(matmul_seconds(size, case.device, dtype))
    return times, matmuls


def _is_slow(times: dict[int, Times], limit: dict[int, Times], steps: int) -> bool:
    """Enough is known of it, and more would take long."""
    both = times.keys() & limit.keys()
    if len(both) < SLOW_ROUNDS or min(times[n].total_s for n in both) * steps < SLOW_S:
        return False
    return min(times[n].total_s / limit[n].total_s for n in both) > SLOW_RATIO


def _line(one: _Checked, shape: Shape, times: dict[str, dict[int, Times]]) -> Line:
    mine, limit = times[one.entry.name], times[LIMIT.name]
    ratios = [mine[n].total_s / limit[n].total_s for n in mine]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    total_s = statistics.median(t.total_s for t in mine.values())
    return Line(
        name=one.entry.name,
        version=one.entry.version,
        error=max(one.errors.values(), default=None),
        errors=one.errors,
        other_choices=one.other_choices,
        rounds=len(mine),
        forward_s=statistics.median(t.forward_s for t in mine.values()),
        total_s=total_s,
        flops_per_s=shape.flops / total_s,
        ratio=statistics.median(ratios),
        ratio_quartiles=(quartiles[0], quartiles[2]),
        cpu_ratio=statistics.median(mine[n].cpu_s / limit[n].cpu_s for n in mine),
        peak_extra_bytes=one.peak_extra_bytes,
    )


def _matmul_size(device: torch.device) -> int:
    return _MATMUL_SIZE[device.type]
