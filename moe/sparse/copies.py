"""Sources and the choices they make -> one row for each choice, sorted by bucket; and the sum back.

M sources, K choices, R rows (M K if all are made), D width. A bucket is an expert, or a rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Copies:
    """Which rows are copies of which source. Integers only; rows of one bucket lie side by side."""

    choice_of_row_R: Tensor
    """int64: flat index into [M, K] of the choice that each row serves."""
    source_of_row_R: Tensor
    """int64: the source that each row copies."""
    row_of_choice_MK: Tensor
    """int64: the row that serves each choice; 0 for a choice that is not made."""
    made_MK: Tensor | None
    """bool: choices that are made; None: all."""
    counts: Tensor
    """int64 [buckets]: rows in each bucket."""

    @cached_property
    def rows_per_bucket(self) -> list[int]:
        """`counts` on the host; on CUDA this waits for the device."""
        return self.counts.tolist()


def copies_of(
    buckets_MK: Tensor,
    num_buckets: int,
    made_MK: Tensor | None = None,
    num_rows: Callable[[], int] | None = None,
) -> Copies:
    """Sort the choices by bucket, those outside `made_MK` left out; stable, so deterministic.

    `num_rows` tells how many choices are made, and is asked when the sort is under way; without it the host waits
    for the device, unless all are made.
    """
    buckets_N = buckets_MK.reshape(-1)
    if made_MK is not None:
        buckets_N = torch.where(made_MK.reshape(-1), buckets_N, num_buckets)  # behind all others
    # A narrow key sorts several times faster on CPU.
    order_N = torch.argsort(buckets_N.to(torch.int16) if num_buckets < 2**15 - 1 else buckets_N, stable=True)
    counts = count(buckets_N, num_buckets + 1)[:num_buckets]
    order_R = order_N
    if made_MK is not None:
        order_R = order_N[: int(counts.sum()) if num_rows is None else num_rows()]
    row_of_choice_N = order_R.new_zeros(buckets_N.shape)
    row_of_choice_N[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    sources_R = order_R // buckets_MK.shape[1]
    return Copies(order_R, sources_R, row_of_choice_N.view(buckets_MK.shape), made_MK, counts)


def count(ids: Tensor, size: int) -> Tensor:
    """int64 [size]: how often each id occurs. `torch.bincount` would wait for the device."""
    flat = ids.reshape(-1)
    if not flat.is_cuda:
        return torch.bincount(flat, minlength=size)
    return torch.zeros(size, dtype=torch.int64, device=ids.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )


def copy_rows(source_MD: Tensor, copies: Copies) -> Tensor:
    """[M, D] -> [R, D]; its gradient is `sum_rows`, a gather too, so deterministic on every device."""
    return _CopyRows.apply(source_MD, copies)  # type: ignore[no-any-return]  # Function.apply is untyped


def sum_rows(rows_RD: Tensor, copies: Copies) -> Tensor:
    """[R, D] -> [M, D]: the sum of each source's rows; its gradient is `copy_rows`."""
    return _SumRows.apply(rows_RD, copies)  # type: ignore[no-any-return]  # Function.apply is untyped


class _CopyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source_MD: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return source_MD.index_select(0, copies.source_of_row_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return _sum(grad_RD, ctx.copies), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return _sum(rows_RD, copies)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        return grad_MD.index_select(0, ctx.copies.source_of_row_R), None


def _sum(rows_RD: Tensor, copies: Copies) -> Tensor:
    """Sums are taken in float32 or wider, then rounded once."""
    if not rows_RD.shape[0]:
        return rows_RD.new_zeros(copies.row_of_choice_MK.shape[0], rows_RD.shape[1])
    # A choice that is not made points at row 0 with weight 0.
    made_MK = None if copies.made_MK is None else copies.made_MK.to(rows_RD.dtype)
    return F.embedding_bag(copies.row_of_choice_MK, rows_RD, mode="sum", per_sample_weights=made_MK)
