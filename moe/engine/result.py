"""What an optimizer step gives back.

L sparse layers, E experts.
"""

from dataclasses import dataclass

from torch import Tensor

from moe.guard import Guard
from moe.sparse.health import Health


@dataclass(frozen=True)
class StepResult:
    """One optimizer step over the global batch; device tensors, so that reading them is the caller's wait."""

    cross_entropy: Tensor
    """Nats per token, before the step."""
    load_balancing: Tensor
    """Mean over sparse layers, unweighted, of the loss with the widest scope in use; 1 is balance."""
    router_z: Tensor
    """Mean over sparse layers."""
    further: Tensor
    """Nats per token of the prediction modules, the mean over modules; 0 without them."""
    total: Tensor
    """What was differentiated."""
    gradient_norm: Tensor
    """Global norm before clipping."""
    learning_rate: float
    num_tokens: int
    """Tokens of the global batch, masked ones included."""
    tokens_per_expert: Tensor | None
    """int64 [L, E] over all ranks and micro-batches; None for a dense model."""
    num_dropped: Tensor | None
    """int64 [L]: choices that found their expert full, over all ranks and micro-batches; None for a dense model."""
    health: Health | None
    """Over all ranks and micro-batches; None if it was not asked for, and for a dense model."""
    guard: Guard
    """After this step."""
    fault: str = ""
    """Why the step was skipped; empty: it was taken."""
