"""A question -> whether the torch optimizer under DeepSpeed's steps, or nothing changes at all."""

from collections.abc import Callable
from typing import Any

import torch


class Gate:
    """Stands before an optimizer's step.

    DeepSpeed measures the global norm just before it steps the optimizer, group by group, and copies the float32
    weights into the model's afterwards. Where the gate stays shut it copies what was there; then it drops the
    gradients as ever.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._step: Callable[..., Any] = optimizer.step
        self._may_pass: Callable[[], bool] = lambda: True
        optimizer.step = self._ask  # type: ignore[method-assign]  # of this one alone, as torch's schedulers do

    def ask(self, may_pass: Callable[[], bool]) -> None:
        """From now on step only if `may_pass()`; it must say the same on all ranks, and for all groups of a step."""
        self._may_pass = may_pass

    def _ask(self, *arguments: Any, **options: Any) -> Any:
        return self._step(*arguments, **options) if self._may_pass() else None
