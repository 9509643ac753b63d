"""One forward and backward of a contender: its numbers, and the time between its parts."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.bench.peers import Contender
from moe.bench.problem import Problem


@dataclass(frozen=True)
class Times:
    """Seconds of one step."""

    forward_s: float
    total_s: float
    """Forward and backward."""
    cpu_s: float
    """Processor time of all threads; on CUDA, of the one that feeds it."""


class Clock:
    """Marks the moments between the parts of steps, on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        self._moments: list[float] = []
        self._cpu: list[float] = []
        self._cuda = device.type == "cuda"

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._moments.append(time.perf_counter())
        self._cpu.append(time.process_time())

    def times(self) -> Times:
        """Means over the steps that were marked at their beginning, middle and end."""
        if self._cuda:
            torch.cuda.synchronize()
            first = self._events[0]
            self._moments = [first.elapsed_time(event) / 1e3 for event in self._events]
        return Times(
            forward_s=_mean_span(self._moments, 1),
            total_s=_mean_span(self._moments, 2),
            cpu_s=_mean_span(self._cpu, 2),
        )


def _mean_span(moments: list[float], marks: int) -> float:
    """From each third mark to the one `marks` later."""
    begins, ends = moments[::3], moments[marks::3]
    return sum(end - begin for begin, end in zip(begins, ends, strict=True)) / len(begins)


def leaf(problem: Problem, contender: Contender) -> Tensor:
    """The input, ready for a step without gradients from an earlier one."""
    contender.zero_grad(set_to_none=True)
    return problem.x_TD.clone().requires_grad_()


def step(contender: Contender, x_TD: Tensor, grad_TD: Tensor, clock: Clock | None = None) -> Tensor:
    """The output; gradients are left in `x_TD` and in the contender's weights."""
    if clock is not None:
        clock.mark()
    y_TD: Tensor = contender(x_TD)
    if clock is not None:
        clock.mark()
    y_TD.backward(grad_TD)
    if clock is not None:
        clock.mark()
    return y_TD.detach()


def timed(contender: Contender, problem: Problem, steps: int) -> Times:
    """Mean of `steps` steps, one right after the other."""
    clock = Clock(problem.x_TD.device)
    for _ in range(steps):
        step(contender, leaf(problem, contender), problem.grad_TD, clock)
    times = clock.times()
    contender.zero_grad(set_to_none=True)
    return times


def matmul_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of one plain matmul of two [size, size], the mean of a few in a row."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    out = torch.mm(a, a)
    clock = Clock(device)
    for _ in range(5):
        clock.mark()
        torch.mm(a, a, out=out)
        clock.mark()
        clock.mark()
    return clock.times().forward_s
