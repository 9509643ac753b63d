"""Keys of a state -> families of weights; moments before and after a step -> the gradient that the optimizer got."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from moe.certify.seen import State
from moe.config import OptimizerConfig

FAMILIES = {
    "prediction modules": (".predictions.",),
    "router": (".router.",),
    "experts": (".experts.",),
    "shared expert": (".shared_expert.", ".shared_expert_gate."),
    "latent projections": (".to_latent.", ".from_latent."),
    "norms": ("norm.",),
    "attention": (".attention.",),
    "dense feed-forward": (".ffn.",),
    "embedding": ("embed.",),
    "head": ("head.",),
}
"""What names of a family hold; the first that fits counts. A report sorts by them, nothing is computed by them."""


@dataclass(frozen=True)
class Deviation:
    """How far one quantity of one step is from what it must be."""

    check: str
    deviation: float
    """Relative; infinite for what is not finite or not there."""
    bound: float
    step: int
    """From 0."""
    tensor: str = ""
    """The first that differs."""
    said: str = ""
    """By how much, in words."""

    @property
    def passed(self) -> bool:
        return self.deviation <= self.bound  # never so for NaN


def family(key: str) -> str:
    """Which weights a key belongs to."""
    name = "." + key.partition("/")[2]
    return next(
        (title for title, marks in FAMILIES.items() if any(m in name for m in marks)), "other weights"
    )


def gradients(after: State, before: State, optimizer: OptimizerConfig) -> dict[str, Tensor]:
    """float64, clipped, by `PARAMETER[EXPERT]` after a slash: what each moment took in.

    AdamW: exp_avg <- beta1 exp_avg + (1 - beta1) g. Muon: momentum <- mu momentum + g.
    """
    found = {}
    for key, moment in after.items():
        state, _, name = key.partition("/")
        if state == "exp_avg":
            beta = optimizer.beta1
            found[f"/{name}"] = (moment.double() - beta * before[key].double()) / (1 - beta)
        elif state == "momentum":
            found[f"/{name}"] = moment.double() - optimizer.momentum * before[key].double()
    return found


def moved(after: Tensor, before: Tensor) -> Tensor:
    """float64."""
    return after.double() - before.double()


def update_size(after: Tensor, before: Tensor) -> float:
    """How far a tensor went."""
    return float(moved(after, before).norm())


def by_expert(state: Mapping[str, Tensor], layer: str, expert: int) -> list[str]:
    """Keys of one expert of the layer whose parameters begin with `layer`."""
    return [key for key in state if key.startswith(layer) and key.endswith(f"[{expert}]")]
