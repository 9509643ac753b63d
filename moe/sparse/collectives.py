"""Rows and counts across the expert-parallel group, with gradients where rows travel.

N rows sent, M rows received, D width, G ranks of the group.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.sparse.once import first_derivative_only


def exchange_counts(counts_G: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Entry g goes to rank g of the group; entry g of the result came from there. int64 [G, ...]."""
    received = torch.empty_like(counts_G)
    dist.all_to_all_single(received, counts_G.contiguous(), group=group)
    return received


class Exchange:
    """An uneven all-to-all of rows [N, D] -> [M, D], started and waited for; its gradient goes the other way.

    What is computed between `start` and `wait` overlaps with it: on the way back too, since autograd runs
    backward in the reverse order, from `wait` to `start`.
    """

    def __init__(
        self, send_splits: list[int], receive_splits: list[int], group: dist.ProcessGroup | None
    ) -> None:
        self.send_splits, self.receive_splits, self.group = send_splits, receive_splits, group
        self.work: dist.Work | None = None
        self.grad: Tensor | None = None

    def start(self, rows_ND: Tensor) -> Tensor:
        """[M, D], not to be read before `wait`."""
        started: Tensor = _Start.apply(rows_ND, self)
        return started

    def wait(self, started_MD: Tensor) -> Tensor:
        """What `start` gave, arrived."""
        arrived: Tensor = _Wait.apply(started_MD, self)
        return arrived


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        arriving, exchange.work = _launch(rows, exchange.send_splits, exchange.receive_splits, exchange.group)
        return arriving

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None]:
        exchange: Exchange = ctx.exchange
        grad, exchange.grad = exchange.grad, None
        _finish(exchange)
        return grad, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        _finish(exchange)
        return arriving.view_as(arriving)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange: Exchange = ctx.exchange
        exchange.grad, exchange.work = _launch(
            grad, exchange.receive_splits, exchange.send_splits, exchange.group
        )
        return grad, None  # a placeholder of the right shape; `_Start` has the real one


def _launch(
    rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None
) -> tuple[Tensor, dist.Work]:
    arriving = rows.new_empty((sum(receive), *rows.shape[1:]))
    work = dist.all_to_all_single(arriving, rows.contiguous(), receive, send, group=group, async_op=True)
    return arriving, work


def _finish(exchange: Exchange) -> None:
    assert exchange.work is not None, "started before it is waited for"
    exchange.work.wait()
    exchange.work = None
