"""Expert ids -> send order, split sizes, arrival order; integers only.

T tokens here, K choices, E experts, e experts held here, N rows sent (T K if all are), R rows received.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe.sparse.collectives import exchange_counts


@dataclass(frozen=True)
class ExpertLayout:
    """Which experts live on which rank: rank r of the group holds experts [r e, (r + 1) e)."""

    num_experts: int
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.size

    @property
    def local_experts(self) -> range:
        """Global ids of the experts held here."""
        return range(self.rank * self.num_local_experts, (self.rank + 1) * self.num_local_experts)


@dataclass(frozen=True)
class Plan:
    """How rows travel. Rows are sent sorted by expert, so those for one rank lie side by side."""

    token_of_row_N: Tensor
    """int64: the token that each sent row copies."""
    row_of_choice_TK: Tensor
    """int64: the sent row that serves each choice of each token; 0 for a choice that is not sent."""
    sent_TK: Tensor | None
    """bool: choices that are sent; None: all."""
    send_splits: list[int]
    """Rows for each rank of the group."""
    receive_splits: list[int]
    """Rows from each rank of the group."""
    arrival_order_R: Tensor | None
    """int64: arrivals come by source and then expert; this gathers them by expert. None on one rank."""
    rows_per_local_expert: list[int]
    """Rows for each expert held here, in order of expert id."""


def make_plan(ids_TK: Tensor, layout: ExpertLayout, sent_TK: Tensor | None = None) -> Plan:
    """Sort the choices by expert and learn from the group how many rows arrive.

    Choices outside `sent_TK` (bool: masked tokens, full experts) stay at home. One exchange of e int64 counts per
    rank pair and one copy to the host; nothing here has a gradient.
    """
    num_choices, num_experts = ids_TK.shape[1], layout.num_experts
    ids_N = ids_TK.reshape(-1)
    if sent_TK is not None:
        ids_N = torch.where(sent_TK.reshape(-1), ids_N, num_experts)  # behind all experts
    # A narrow key sorts several times faster on CPU; the sort is stable, so a plan is deterministic.
    order_N = torch.argsort(ids_N.to(torch.int16) if num_experts < 2**15 - 1 else ids_N, stable=True)
    sent_E = torch.bincount(ids_N, minlength=num_experts + 1)[:num_experts]
    sent_GE = sent_E.view(layout.size, layout.num_local_experts)
    received_GE = exchange_counts(sent_GE, layout.group) if layout.size > 1 else sent_GE
    send_splits, receive_splits, per_expert = _on_host(sent_GE.sum(1), received_GE.sum(1), received_GE.sum(0))
    order_N = order_N[: sum(send_splits)]
    row_of_choice_N = torch.zeros_like(ids_N)
    row_of_choice_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return Plan(
        token_of_row_N=order_N // num_choices,
        row_of_choice_TK=row_of_choice_N.view(ids_TK.shape),
        sent_TK=sent_TK,
        send_splits=send_splits,
        receive_splits=receive_splits,
        arrival_order_R=_by_expert(received_GE) if layout.size > 1 else None,
        rows_per_local_expert=per_expert,
    )


def _by_expert(received_GE: Tensor) -> Tensor:
    """Gather index that turns (source, expert) order into (expert, source) order, rows in a block kept."""
    experts_E = torch.arange(received_GE.shape[1], device=received_GE.device)
    expert_of_row_R = experts_E.repeat(received_GE.shape[0]).repeat_interleave(received_GE.reshape(-1))
    return torch.argsort(expert_of_row_R, stable=True)


def _on_host(*tensors: Tensor) -> list[list[int]]:
    """Several small integer vectors to the host in one copy."""
    flat = torch.cat(tensors).tolist()
    lists, start = [], 0
    for tensor in tensors:
        lists.append(flat[start : start + tensor.numel()])
        start += tensor.numel()
    return lists
