"""What one training is asked to do, and what was seen of it: plain tensors and numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe.certify.layouts import Layout
from moe.certify.shrink import STEPS
from moe.config import RunConfig

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Job:
    """One training to observe."""

    name: str
    """Of the file with what was seen."""
    run: RunConfig
    layout: Layout
    first: int = 0
    """Step to begin at; after 0 from the newest checkpoint in the run's folder."""
    last: int = STEPS
    save_at: int | None = None
    """Steps after which a checkpoint is written."""
    padding: int = 0
    """What stands where nothing counts."""


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    total: float
    cross_entropy: float
    load_balancing: float
    router_z: float
    further: float
    """Of prediction modules."""
    gradient_norm: float
    """As the first rank reports it."""
    gradient_norms: tuple[float, ...]
    """As each rank reports it."""
    unequal: str
    """The first parameter of which ranks hold different copies; empty: none."""
    learning_rate: float
    num_tokens: int
    """Those that count, by the mask alone."""
    tokens_per_expert: Tensor | None
    """int64 [L, E]; None for a dense model."""
    state: State
    """After the step: `STATE/PARAMETER` or, for one expert, `STATE/PARAMETER[EXPERT]`."""


@dataclass(frozen=True)
class Seen:
    """A training as it went."""

    before: State
    """The state at its beginning."""
    steps: tuple[Step, ...]
    first: int = 0


def write(seen: Seen, path: Path) -> None:
    """Write what was seen, whole or not at all."""
    partial = path.with_suffix(".part")
    torch.save(seen, partial)
    partial.rename(path)


def read(path: Path) -> Seen:
    """What `write` wrote."""
    seen: Seen = torch.load(path, weights_only=False)
    return seen
