"""Gradients -> orthogonal steps for matrices, AdamW's steps for the rest.

N matrices, R rows, C columns, P elements of a tensor or of this rank's partition.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.config import OptimizerConfig
from moe.optim.adamw import AdamW
from moe.optim.exchange import complete
from moe.optim.matrices import Stack
from moe.optim.newton_schulz import orthogonalize
from moe.optim.share import Share, share

UPDATE_RMS = 0.2
"""Root mean square of an update's elements at learning rate 1, about what AdamW's have (arXiv:2502.16982, 2.2)."""


@dataclass(frozen=True)
class _Place:
    """What a tensor that is stepped holds of the matrices, and with whom it shares those that are cut."""

    share: Share
    ranks: dist.ProcessGroup | None
    index: int


class Muon(AdamW):
    """Muon for groups of kind "muon", AdamW for the others, with one learning rate and one weight decay.

    M <- mu M + G;  O = orthogonalize(mu M + G);  W <- W - rate (0.2 sqrt(max(R, C)) O + decay W), for each matrix of
    a stacked or fused parameter on its own (https://kellerjordan.github.io/posts/muon; arXiv:2502.16982, eq. 1-4).

    O has one size whatever that of M. So clipping gradients, which comes first, never shrinks a step: it limits how
    much one batch turns M. And a matrix without any gradient, such as an expert's that no token chose, would go on
    at full speed wherever old tokens sent it until M vanishes, hundreds of steps later: it stands still instead, but
    for its decay, while M fades.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        config: OptimizerConfig,
        stacks: dict[Tensor, Stack],
        cuda_dtype: torch.dtype | None = None,
    ) -> None:
        """`cuda_dtype`: in which to orthogonalise on CUDA, where bf16 is usual; else float32 or the tensor's."""
        super().__init__(
            groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )
        self.momentum = config.momentum
        self.stacks = stacks
        self.cuda_dtype = cuda_dtype
        self._places = {
            tensor: _Place(share([(0, stack)], tensor.numel(), 0), None, 0)
            for tensor, stack in stacks.items()
        }

    def partition(
        self, tensor: Tensor, placed: Iterable[tuple[int, Stack]], ranks: dist.ProcessGroup
    ) -> None:
        """Step `tensor`, [P], as this rank's of the equal partitions of a flat buffer, in the order of `ranks`.

        `placed` says where in the whole buffer each stack begins.
        """
        index = dist.get_rank(ranks)
        self._places[tensor] = _Place(share(placed, tensor.numel(), index), ranks, index)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it by closure
        """One step of every group. Collective over the ranks that share a partitioned tensor."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["kind"] != "muon"]
        loss: float | None = super().step(closure)
        self.param_groups = groups
        for group in groups:
            if group["kind"] == "muon":
                for tensor in group["params"]:
                    self._update(tensor, group)
        return loss

    def _update(self, tensor: Tensor, group: dict[str, Any]) -> None:
        if tensor.grad is None:
            return
        if "momentum" not in self.state[tensor]:
            self.state[tensor]["momentum"] = torch.zeros_like(tensor)
        momentum_P, gradient_P = self.state[tensor]["momentum"].view(-1), tensor.grad.reshape(-1)
        momentum_P.mul_(self.momentum).add_(gradient_P)
        direction_P = gradient_P.add(momentum_P, alpha=self.momentum)  # Nesterov's
        weight_P = tensor.view(-1)
        weight_P.mul_(1 - group["lr"] * group["weight_decay"])
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        if tensor.is_cuda and self.cuda_dtype is not None:
            dtype = self.cuda_dtype
        for here, inside, x_NRC in _matrices(self._places[tensor], direction_P, gradient_P):
            update = orthogonalize(x_NRC, dtype).flatten()[inside].to(tensor.dtype)
            rate = group["lr"] * UPDATE_RMS * math.sqrt(max(x_NRC.shape[1:]))
            weight_P[here].add_(update, alpha=-rate)


def _matrices(
    place: _Place, direction_P: Tensor, gradient_P: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(where in the tensor, which elements of the flattened matrices those are, the matrices [N, R, C])."""
    for run in place.share.runs:
        shape = (run.stack.count, run.stack.rows, run.stack.columns)
        used_N = (gradient_P[run.here].view(run.stack.count, -1) != 0).any(1)
        yield run.here, slice(None), direction_P[run.here].view(shape) * used_N.view(-1, 1, 1)
    if place.ranks is None:
        return
    cuts = place.share.cuts
    used = [(gradient_P[cut.here] != 0).any() for cut in cuts]
    for cut, (whole, anywhere) in zip(cuts, complete(direction_P, used, cuts, place.ranks), strict=True):
        yield cut.here, cut.pieces[place.index], (whole * anywhere).view(1, cut.rows, cut.columns)
