"""Rows and counts across the expert-parallel group, with gradients where rows travel."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def exchange_counts(counts_GE: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Row g goes to rank g of the group; row g of the result came from there. int64 [G, e]."""
    received = torch.empty_like(counts_GE)
    dist.all_to_all_single(received, counts_GE.contiguous(), group=group)
    return received


def exchange_rows(
    rows_ND: Tensor, send_splits: list[int], receive_splits: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Uneven all-to-all of rows [N, D] -> [R, D]; its gradient is the exchange backwards."""
    exchanged: Tensor = _ExchangeRows.apply(rows_ND, send_splits, receive_splits, group)
    return exchanged


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
    arrived = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(arrived, rows.contiguous(), receive, send, group=group)
    return arrived
