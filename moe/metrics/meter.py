"""Results of steps -> records: reads device tensors only when one is due, and keeps the time.

L sparse layers, E experts.
"""

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
from moe.sparse.health import Health, dead_experts, normalized_entropy


class Result(Protocol):
    """What a record needs of an optimizer step; see `moe.engine.StepResult`."""

    @property
    def cross_entropy(self) -> Tensor: ...
    @property
    def load_balancing(self) -> Tensor: ...
    @property
    def router_z(self) -> Tensor: ...
    @property
    def further(self) -> Tensor: ...
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
    @property
    def health(self) -> Health | None: ...


class Meter:
    """Counts steps and seconds, and hands the tracker a record every `logging.every_steps`."""

    def __init__(self, run: RunConfig, ranks: Ranks, tracker: Tracker | None) -> None:
        dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
        peak = peak_flops(ranks.device, dtype, run.logging.peak_tflops) * ranks.world_size
        self._share_per_token = count(run.model, run.data.sequence_length).flops_per_token / peak
        self._run, self._tracker = run, tracker
        self._began, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def due(self, step: int) -> bool:
        """Whether `step` (from 1) gets a record; the same on all ranks."""
        return step % self._run.logging.every_steps == 0 or step == self._run.train.steps

    def step(
        self, result: Result, *, step: int, tokens: int, unused: Tensor | None = None, skipped: int = 0
    ) -> None:
        """Count the step that brought the run to `step` and `tokens`; write its record if one is due.

        `unused`: int64 [L, E], the steps since each expert had a token. `skipped`: steps so far that were.
        """
        self._steps += 1
        if not self.due(step):
            return
        record = {"step": step, "tokens": tokens, **self._record(result, unused)}
        if self._run.train.guard.skips:
            record["skipped_steps"] = skipped
        if self._tracker is not None:
            self._tracker.log(record)
        self._began, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def skipped(self, result: Result, fault: str, *, step: int, in_a_row: int, skipped: int) -> None:
        """Count the step that brought the run to `step` without changing it, and record why."""
        self._steps += 1
        if self._tracker is not None:
            values = {"skipped_loss": result.cross_entropy, "skipped_grad_norm": result.gradient_norm}
            # JSON has no NaN.
            known = {name: float(value) for name, value in values.items() if value.isfinite()}
            counts = {"skipped_in_a_row": in_a_row, "skipped_steps": skipped}
            self._tracker.skipped({"step": step, "skipped": fault, **known, **counts})

    def rolled_back(self, good: int, *, step: int, skipped: int, times: int) -> None:
        """Record that the run, at `step`, has the weights of checkpoint `good`; what was learned since then is gone."""
        if self._tracker is not None:
            counts = {"skipped_steps": skipped, "roll_backs": times}
            self._tracker.rolled_back({"step": step, "rolled_back_to": good, **counts})

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave what happens inside (evaluation, a save) out of the tokens per second."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what happens inside as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def _record(self, result: Result, unused: Tensor | None) -> dict[str, Any]:
        loss = float(result.cross_entropy)  # waits for the device
        seconds = (time.perf_counter() - self._began) / self._steps
        record: dict[str, Any] = {
            "loss": loss,
            "grad_norm": float(result.gradient_norm),
            "learning_rate": result.learning_rate,
            "seconds": seconds,
            "data_wait": self._waited / (seconds * self._steps),
            "tokens_per_second": result.num_tokens / seconds,
            "mfu": result.num_tokens / seconds * self._share_per_token,
        }
        if self._run.model.prediction_depth:
            record["prediction_loss"] = float(result.further)
        counts_LE = result.tokens_per_expert
        if counts_LE is not None:
            limited = self._run.balance.capacity_factor is not None
            per_layer = _per_layer(counts_LE, result.num_dropped if limited else None, result.health, unused)
            record["load_balancing_loss"] = float(result.load_balancing)
            record["router_z_loss"] = float(result.router_z)
            record["max_violation"] = max(per_layer["max_violation"])
            if "dead_experts" in per_layer:
                record["dead_experts"] = sum(per_layer["dead_experts"])
            if limited and result.num_dropped is not None:
                record["dropped"] = int(result.num_dropped.sum()) / max(int(counts_LE.sum()), 1)
            record["tokens_per_expert"] = counts_LE.tolist()
            record["per_layer"] = per_layer
        return record


def _per_layer(
    counts_LE: Tensor, num_dropped_L: Tensor | None, health: Health | None, unused_LE: Tensor | None
) -> dict[str, list[float]]:
    """What is known of each sparse layer, by the names that records have; here the tensors are read."""
    found = {"max_violation": max_violation(counts_LE), "load_entropy": normalized_entropy(counts_LE)}
    if num_dropped_L is not None:
        found["dropped"] = num_dropped_L.double() / counts_LE.sum(1).clamp(min=1)
    if unused_LE is not None:
        found["dead_experts"] = dead_experts(unused_LE)
        found["steps_since_use"] = unused_LE.amax(1)
    if health is not None:
        found |= {name: value for name, value in vars(health).items() if value is not None}
    return {name: value.tolist() for name, value in found.items()}
