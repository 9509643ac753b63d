"""The sparse layer beside the dense limit and its peers: interleaved, median, forward and backward.

`python -m moe.bench.layer --threads 1 --dtype fp32 --json layer.json`. Ratios count, not seconds: every round runs
each contender once, so what disturbs the machine disturbs all. Set MALLOC_MMAP_THRESHOLD_ and the like outside to
see what the allocator does; it is the same for all.
"""

import gc
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moe.bench.peers import ENTRIES, Contender, Entry
from moe.bench.problem import Answer, Problem, Shape, solve

BOUND = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative error (Frobenius) of an answer that counts as right."""


@dataclass(frozen=True)
class Line:
    """What one contender did."""

    name: str
    version: str
    error: float | None
    """Against float64; None for the dense limit, which solves another problem."""
    forward_s: float
    total_s: float
    cpu_s: float
    ratio: float
    """Wall time over the dense limit's, medians."""
    cpu_ratio: float


def run(shape: Shape, dtype: str, rounds: int) -> list[Line]:
    """Check every contender's numbers, then time them in turn."""
    problem = Problem.draw(shape, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    right = solve(problem)
    built: list[tuple[Entry, Contender, float | None]] = []
    for entry in ENTRIES:
        contender = entry.build(problem)
        built.append((entry, contender, _check(contender, problem, right)))
        gc.collect()
    times: dict[str, list[tuple[float, float, float]]] = {entry.name: [] for entry in ENTRIES}
    for _ in track(range(rounds), description="rounds", console=Console(stderr=True)):
        for entry, contender, _ in built:
            times[entry.name].append(_step(contender, problem)[0])
    medians = {
        name: tuple(statistics.median(column) for column in zip(*t, strict=True)) for name, t in times.items()
    }
    dense = medians["dense limit"]
    return [
        Line(
            name=entry.name,
            version=entry.version,
            error=error,
            forward_s=medians[entry.name][0],
            total_s=medians[entry.name][1],
            cpu_s=medians[entry.name][2],
            ratio=medians[entry.name][1] / dense[1],
            cpu_ratio=medians[entry.name][2] / dense[2],
        )
        for entry, _, error in built
    ]


def _check(contender: Contender, problem: Problem, right: Answer) -> float | None:
    _, y, x_grad = _step(contender, problem)
    grads = contender.grads()
    return None if grads is None else Answer(y, x_grad, *grads).error(right)


def _step(
    contender: Contender, problem: Problem
) -> tuple[tuple[float, float, float], torch.Tensor, torch.Tensor]:
    """((forward seconds, forward and backward seconds, CPU seconds), output, gradient of x)."""
    for parameter in contender.parameters():
        parameter.grad = None
    x = problem.x_TD.clone().requires_grad_()
    began, cpu = time.perf_counter(), time.process_time()
    y = contender(x)
    forward = time.perf_counter() - began
    y.backward(problem.grad_TD)
    spent = (forward, time.perf_counter() - began, time.process_time() - cpu)
    assert x.grad is not None
    return spent, y.detach(), x.grad


@click.command("layer")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=4096, show_default=True)
@click.option("--hidden", type=click.IntRange(min=8), default=512, show_default=True)
@click.option("--inner", type=click.IntRange(min=8), default=256, show_default=True)
@click.option("--experts", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--top-k", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here too.")
def command(
    dtype: str,
    threads: int,
    rounds: int,
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    top_k: int,
    json_path: Path | None,
) -> None:
    """Time the sparse layer, the dense limit and the peers that are installed; exit 1 if any answer is wrong."""
    torch.set_num_threads(threads)
    shape = Shape(tokens, hidden, inner, experts, top_k)
    lines = run(shape, dtype, rounds)
    title = f"{dtype}, {threads} threads, {tokens} tokens, {hidden}/{inner}, {experts} experts, top {top_k}"
    table = Table(
        "",
        "version",
        "error",
        "forward ms",
        "total ms",
        "GFLOP/s",
        "wall / dense",
        "CPU / dense",
        title=title,
    )
    for line in sorted(lines, key=lambda line: line.ratio):
        error = "-" if line.error is None else f"{line.error:.1e}"
        speed = shape.flops / line.total_s / 1e9
        ms = (f"{1e3 * line.forward_s:.0f}", f"{1e3 * line.total_s:.0f}", f"{speed:.0f}")
        table.add_row(line.name, line.version, error, *ms, f"{line.ratio:.2f}", f"{line.cpu_ratio:.2f}")
    Console(width=120).print(table)
    if json_path is not None:
        allocator = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
        page = {
            "shape": asdict(shape),
            "dtype": dtype,
            "threads": threads,
            "rounds": rounds,
            "allocator": allocator,
        }
        json_path.write_text(json.dumps({**page, "lines": [asdict(line) for line in lines]}, indent=1) + "\n")
    wrong = [line.name for line in lines if line.error is not None and not line.error <= BOUND[dtype]]
    if wrong:
        raise click.ClickException(f"wrong numbers: {', '.join(wrong)}")


if __name__ == "__main__":
    command()
