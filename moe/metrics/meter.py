"""Results of steps -> records: reads device tensors only when one is due, and keeps the time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from moe.config import RunConfig
from moe.dist import Ranks
from moe.metrics.peak import peak_flops
from moe.metrics.tracker import Tracker
from moe.model import count
from moe.sparse.balance import max_violation


class Result(Protocol):
    """What a record needs of an optimizer step; see `moe.engine.StepResult`."""

    @property
    def cross_entropy(self) -> Tensor: ...
    @property
    def load_balancing(self) -> Tensor: ...
    @property
    def router_z(self) -> Tensor: ...
    @property
    def gradient_norm(self) -> Tensor: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def tokens_per_expert(self) -> Tensor | None: ...
    @property
    def num_dropped(self) -> Tensor | None: ...


class Meter:
    """Counts steps and seconds, and hands the tracker a record every `logging.every_steps`."""

    def __init__(self, run: RunConfig, ranks: Ranks, tracker: Tracker | None) -> None:
        dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
        peak = peak_flops(ranks.device, dtype, run.logging.peak_tflops) * ranks.world_size
        self._share_per_token = count(run.model, run.data.sequence_length).flops_per_token / peak
        self._run, self._tracker = run, tracker
        self._began, self._steps = time.perf_counter(), 0

    def step(self, result: Result, *, step: int, tokens: int) -> None:
        """Count the step that brought the run to `step` and `tokens`; write its record if one is due."""
        self._steps += 1
        if step % self._run.logging.every_steps and step != self._run.train.steps:
            return
        record = {"step": step, "tokens": tokens, **self._record(result)}
        if self._tracker is not None:
            self._tracker.log(record)
        self._began, self._steps = time.perf_counter(), 0

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave what happens inside (evaluation, a save) out of the tokens per second."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def _record(self, result: Result) -> dict[str, Any]:
        loss = float(result.cross_entropy)  # waits for the device
        seconds = (time.perf_counter() - self._began) / self._steps
        record: dict[str, Any] = {
            "loss": loss,
            "grad_norm": float(result.gradient_norm),
            "learning_rate": result.learning_rate,
            "seconds": seconds,
            "tokens_per_second": result.num_tokens / seconds,
            "mfu": result.num_tokens / seconds * self._share_per_token,
        }
        if result.tokens_per_expert is not None:
            record["load_balancing_loss"] = float(result.load_balancing)
            record["router_z_loss"] = float(result.router_z)
            record["max_violation"] = float(max_violation(result.tokens_per_expert).max())
            record["tokens_per_expert"] = result.tokens_per_expert.tolist()
            if self._run.balance.capacity_factor is not None and result.num_dropped is not None:
                choices = int(result.tokens_per_expert.sum())
                record["dropped"] = int(result.num_dropped) / max(choices, 1)
        return record
