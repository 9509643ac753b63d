"""What training does with a step that would spoil it, and the rules of these settings."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from moe.config.base import LARGEST, Section, Size


class GuardConfig(Section):
    """A step that is skipped changes no weight, moment or bias; its batch is consumed and the step counts."""

    non_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite leads to: the end of the run, or a skipped step."""
    sigma_factor: PositiveFloat | None = None
    """Skip a step whose loss or gradient norm is so many standard deviations above the mean of the steps before it
    (OLMo-core's SkipStepOptimizer; 6 is usual); null: never."""
    rolling_interval_length: Annotated[int, Field(ge=2, le=LARGEST)] = 128
    """Latest steps, without skipped ones, that make up the mean; half of them are needed before a step is skipped."""
    max_in_a_row: Size = 10
    """Skipped steps in a row that are too many."""
    then: Literal["stop", "roll_back"] = "stop"
    """What too many lead to: the end of the run, or the last checkpoint without any of them, and on from there with
    the batches that come next, none of those in between (arXiv:2204.02311, section 5.1)."""
    max_roll_backs: Size = 3
    """Roll-backs of a run; what would need one more ends it."""

    @property
    def skips(self) -> bool:
        """Whether any step can be skipped."""
        return self.non_finite == "skip" or self.sigma_factor is not None

    @property
    def least_history(self) -> int:
        """Steps that a mean and a deviation need."""
        return max(2, self.rolling_interval_length // 2)


def guard_faults(guard: GuardConfig, *, steps: int, checkpoint_every: int | None, offload: str) -> list[str]:
    """What has no effect or cannot be, a sentence each; `steps`: of the run."""
    faults, default = [], GuardConfig()
    for key in ("max_in_a_row", "then"):
        if not guard.skips and getattr(guard, key) != getattr(default, key):
            faults.append(
                f"train.guard.{key} is {getattr(guard, key)}, but no step is ever skipped, so it has no effect. Remove "
                f"it, or set train.guard.non_finite=skip or a train.guard.sigma_factor (such as 6)."
            )
    if guard.sigma_factor is None and guard.rolling_interval_length != default.rolling_interval_length:
        faults.append(
            f"train.guard.rolling_interval_length is {guard.rolling_interval_length}, but sigma_factor is null, so it "
            f"has no effect. Remove it, or set train.guard.sigma_factor (such as 6)."
        )
    if guard.sigma_factor is not None and guard.least_history >= steps:
        faults.append(
            f"train.guard.sigma_factor is {guard.sigma_factor}, but it looks for spikes only after "
            f"{guard.least_history} steps, half of rolling_interval_length, and train.steps is {steps}: it has no "
            f"effect. Use a smaller rolling_interval_length, or remove sigma_factor."
        )
    if guard.then != "roll_back" and guard.max_roll_backs != default.max_roll_backs:
        faults.append(
            f"train.guard.max_roll_backs is {guard.max_roll_backs}, but then is {guard.then}, so it has no effect. "
            f"Remove it, or set train.guard.then=roll_back."
        )
    if guard.then == "roll_back" and checkpoint_every is None:
        faults.append(
            "train.guard.then is roll_back, but checkpoint.every_steps is null: there would be no checkpoint to go "
            "back to. Set checkpoint.every_steps, or train.guard.then=stop."
        )
    if guard.skips and offload != "none":
        # Seen with 0.19.8 under ZeRO 2: the step after a skipped one is not finite either.
        faults.append(
            f"train.guard lets steps be skipped, but parallel.offload is {offload}: there DeepSpeed 0.19.8 was seen to "
            f"let a bad gradient spoil the next step too. Use parallel.offload=none, or remove train.guard."
        )
    return faults
