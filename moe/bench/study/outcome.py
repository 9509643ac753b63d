"""A finished run's folder -> its figures; runs of one kind -> mean, spread, and what a difference is worth.

L sparse layers, E experts.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe.bench.study.plan import Job
from moe.errors import CheckpointError
from moe.records import read

LAST_STEPS = 50
"""Steps at the end of training over which load is judged."""

EVALUATION = "evaluation.json"
"""In a run's folder: what `turnout evaluate --json` wrote."""


@dataclass(frozen=True)
class Load:
    """How evenly experts were used."""

    step_violation: float
    """max_violation of a step, worst layer, mean over the last steps of training."""
    held_out_violation: float
    """max_violation over the whole held-out split, worst layer."""
    dead_in_training: int
    """Experts, of all layers, that got no token in the last steps of training."""
    dead_held_out: int
    """Experts, of all layers, that get no token of the held-out split."""
    experts: int
    """L E."""


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    model: str
    policy: str | None
    learning_rate: float
    seed: int
    step: int
    loss: float
    """Held-out nats per token."""
    bits_per_byte: float
    load: Load | None
    """None for a dense model."""

    @classmethod
    def read(cls, job: Job) -> "Outcome | None":
        """Of a run that is done and evaluated; None if it isn't. Raises `CheckpointError` for broken files."""
        path = job.run.folder / EVALUATION
        if not (job.run.folder / "done").is_file() or not path.is_file():
            return None
        try:
            page = json.loads(path.read_text(encoding="utf-8"))
            if page["step"] != job.run.train.steps:
                return None
            load = None
            if page["tokens_per_expert"] is not None:
                load = _load(job.run.folder / "metrics.jsonl", page["tokens_per_expert"])
            return cls(
                job.model,
                job.policy,
                job.learning_rate,
                job.seed,
                page["step"],
                page["loss"],
                page["bits_per_byte"],
                load,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error!r}). Remove it: the same command evaluates that run again."
            ) from None

    @classmethod
    def from_page(cls, page: dict[str, Any]) -> "Outcome":
        """What `asdict` made, back."""
        load = page["load"]
        return cls(**{**page, "load": None if load is None else Load(**load)})

    def page(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Spread:
    """Values of runs that differ in the seed alone."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.fmean(values), min(values), max(values))


def differences(baseline: Sequence[Outcome], other: Sequence[Outcome]) -> list[float]:
    """Loss of `other` minus the baseline's, seed by seed: the same seed means the same batches in the same order."""
    of_seed = {outcome.seed: outcome.loss for outcome in baseline}
    return [outcome.loss - of_seed[outcome.seed] for outcome in other if outcome.seed in of_seed]


@dataclass(frozen=True)
class Comparison:
    """Differences seed by seed, and what they are worth."""

    mean: float
    margin: float
    """Half the 95 % confidence interval of the mean (Student's t, paired by seed); infinite for one seed."""

    @classmethod
    def of(cls, found: Sequence[float]) -> "Comparison":
        if len(found) < 2:
            return cls(statistics.fmean(found), math.inf)
        quantile = _T_95[min(len(found) - 1, len(_T_95)) - 1]
        return cls(statistics.fmean(found), quantile * statistics.stdev(found) / math.sqrt(len(found)))

    @property
    def verdict(self) -> str:
        """lower, higher, or no result: what seeds alone could do."""
        if abs(self.mean) <= self.margin:
            return "no result"
        return "lower" if self.mean < 0 else "higher"


_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t with 1 to 9 degrees of freedom; the last is on the safe side beyond."""


def _load(metrics: Path, held_out_LE: list[list[int]]) -> Load:
    records = [row for row in read(metrics).training if row.get("tokens_per_expert")][-LAST_STEPS:]
    in_training_LE = [
        [sum(loads) for loads in zip(*layers, strict=True)]
        for layers in zip(*(row["tokens_per_expert"] for row in records), strict=True)
    ]
    return Load(
        step_violation=statistics.fmean(row["max_violation"] for row in records),
        held_out_violation=max(max(load_E) / statistics.fmean(load_E) - 1 for load_E in held_out_LE),
        dead_in_training=sum(load_E.count(0) for load_E in in_training_LE),
        dead_held_out=sum(load_E.count(0) for load_E in held_out_LE),
        experts=sum(map(len, held_out_LE)),
    )
