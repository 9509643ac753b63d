"""Loss and gradient norm of a step, and of those before it -> whether it may change the weights; plain numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe.config import GuardConfig


@dataclass(frozen=True)
class Guard:
    """What a run's latest steps were like, and what was done about bad ones; part of its state."""

    losses: tuple[float, ...] = ()
    """Cross-entropies of the latest steps that were taken, oldest first; none are kept unless spikes are looked for."""
    norms: tuple[float, ...] = ()
    """Their global gradient norms."""
    skipped: int = 0
    """Of the steps counted, those that changed no weight."""
    in_a_row: int = 0
    """Latest steps that were skipped, one after the other."""
    roll_backs: int = 0

    def fault(self, config: GuardConfig, loss: float, norm: float) -> str:
        """Why the step may not be taken, with the values; empty: it may.

        Exact sums, so that the answer is the same on every rank and after a resume.
        """
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(norm):
            return "its gradient is not finite"  # DeepSpeed says inf of NaN too
        if config.sigma_factor is not None and len(self.losses) >= config.least_history:
            for name, value, before in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
                mean, deviation = _spread(before)
                if value > mean + config.sigma_factor * deviation:
                    return (
                        f"its {name} of {value:.4f} is more than {config.sigma_factor:g} standard deviations of "
                        f"{deviation:.4f} above {mean:.4f}, the mean of the last {len(before)} steps taken"
                    )
        return ""

    def taken(self, config: GuardConfig, loss: float, norm: float) -> "Guard":
        """After a step that was taken."""
        if config.sigma_factor is None:
            return replace(self, losses=(), norms=(), in_a_row=0)
        latest = config.rolling_interval_length
        losses, norms = (*self.losses, loss)[-latest:], (*self.norms, norm)[-latest:]
        return replace(self, losses=losses, norms=norms, in_a_row=0)

    def passed_over(self) -> "Guard":
        """After a step that was skipped: its values count in no mean."""
        return replace(self, skipped=self.skipped + 1, in_a_row=self.in_a_row + 1)

    def after(self, config: GuardConfig, loss: float, norm: float) -> "Guard":
        """After a step that was taken or skipped as `fault` says."""
        return self.passed_over() if self.fault(config, loss, norm) else self.taken(config, loss, norm)

    def rolled_back(self, undone: int, roll_backs: int) -> "Guard":
        """This guard, of a checkpoint, `undone` steps later that count as skipped, after so many roll-backs."""
        return replace(self, skipped=self.skipped + undone, in_a_row=0, roll_backs=roll_backs)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) * (value - mean) for value in values)
    return mean, math.sqrt(squares / (len(values) - 1))
