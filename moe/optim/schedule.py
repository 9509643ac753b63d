"""A step's number -> its learning rate; a pure function, so there is no state to save."""

import math

from moe.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """The rate of optimizer step `step`, counted from 0.

    Linear warm-up over `warmup_steps`; then a half cosine to final_fraction (arXiv:1608.03983, eq. 5), or a
    plateau with a linear decay over the last `decay_steps` (WSD, arXiv:2404.06395, section 4), or a plateau.
    """
    schedule, peak = train.schedule, train.optimizer.learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    final = schedule.final_fraction
    match schedule.kind:
        case "constant":
            return peak
        case "cosine":
            # The last step, train.steps - 1, reaches the final fraction.
            span = max(1, train.steps - 1 - schedule.warmup_steps)
            progress = min(1.0, (step - schedule.warmup_steps) / span)
            return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
        case "wsd":
            assert schedule.decay_steps is not None, "checked by moe.config.rules"
            left = max(0, train.steps - 1 - step)
            return peak * (final + (1 - final) * min(1.0, left / schedule.decay_steps))
