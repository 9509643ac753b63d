"""torch's AdamW, step by step the same, without loading torch's compiler.

torch 2.13 wraps an optimizer's methods so that its compiler leaves them alone when it compiles, and for that loads the
compiler, sympy and FSDP with it, whether or not anybody compiles: about a third of what a rank needs to start. Nobody
compiles ours.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch


def _bare(name: str) -> Any:
    """A method as torch wrote it, before it was wrapped."""
    return inspect.unwrap(getattr(torch.optim.AdamW, name))


_STEP = _bare("step")


class AdamW(torch.optim.AdamW):
    """The same steps and states; gradients of a step itself (`differentiable`) it has none."""

    add_param_group = _bare("add_param_group")
    zero_grad = _bare("zero_grad")
    state_dict = _bare("state_dict")
    load_state_dict = _bare("load_state_dict")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it by closure
        """One step of every group."""
        loss: float | None = _STEP(self, closure)
        return loss
