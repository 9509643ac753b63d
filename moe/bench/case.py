"""Options -> what is compared, on what, how often; or why that cannot be."""

import os
from dataclasses import dataclass
from typing import Literal

import torch

from moe.bench.problem import PRESETS, RoutingKind, Shape
from moe.errors import ConfigError

BatchKind = Literal["same", "new"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_DEVICES = {"cpu": {"rounds": 5, "warmup": 0, "steps": 1}, "cuda": {"rounds": 20, "warmup": 2, "steps": 10}}
"""On CPU the check of the numbers is warm-up enough; on CUDA a step is too short to be timed alone."""

_MORE_ROUNDS = 9
"""On CPU for shapes as cheap as the small one."""


@dataclass(frozen=True)
class Case:
    """What is compared, on what, how often."""

    shape: Shape
    dtype: str
    device: torch.device
    routing: RoutingKind
    rounds: int
    warmup: int
    """Rounds before those that count."""
    steps: int
    """Steps of a contender in a round; their mean counts."""
    batches: BatchKind = "same"
    """Whether all rounds have the same batch, or each a new one."""


def make_case(
    shape: Shape,
    *,
    dtype: str,
    device: str | None = None,
    threads: int | None = None,
    routing: RoutingKind = "real",
    rounds: int | None = None,
    warmup: int | None = None,
    batches: BatchKind = "same",
) -> Case:
    """What to compare, with defaults by device.

    Raises `ConfigError`: a shape that no layer can have, a device that is not there, options without effect.
    """
    _check_shape(shape, routing)
    found = _device(device)
    if threads is not None and found.type == "cuda":
        raise ConfigError("--threads is about CPU, so it has no effect with --device cuda. Leave it out.")
    available = len(os.sched_getaffinity(0))
    if threads is not None and threads > available:
        raise ConfigError(
            f"--threads is {threads}, but this process may use {available} processors. Use so many."
        )
    usual = _DEVICES[found.type]
    if found.type == "cpu" and shape.flops <= PRESETS["small"].flops:
        usual = {**usual, "rounds": _MORE_ROUNDS}
    return Case(
        shape=shape,
        dtype=dtype,
        device=found,
        routing=routing,
        rounds=usual["rounds"] if rounds is None else rounds,
        warmup=usual["warmup"] if warmup is None else warmup,
        steps=usual["steps"],
        batches=batches,
    )


def _check_shape(shape: Shape, routing: RoutingKind) -> None:
    if shape.top_k > shape.experts:
        raise ConfigError(
            f"--top-k is {shape.top_k}, but there are {shape.experts} experts: a token visits each at most once. "
            f"Use at most {shape.experts}."
        )
    for name in ("hidden", "inner"):
        if (width := getattr(shape, name)) % 8:
            raise ConfigError(
                f"--{name} is {width}: grouped GEMMs need rows that start at 16 bytes. Use a multiple of 8."
            )
    choices = shape.tokens * shape.top_k
    if routing == "forced" and choices % shape.experts:
        raise ConfigError(
            f"--routing is forced, but {choices} choices cannot be shared equally by {shape.experts} experts. "
            f"Use a number of tokens that makes tokens x top_k a multiple of {shape.experts}."
        )


def _device(name: str | None) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError(
            "--device is cuda, but torch finds no CUDA device here. Leave it out, or use --device cpu."
        )
    return torch.device("cuda" if there and name != "cpu" else "cpu")
