"""Rows to their experts and back: a copy on one rank, an uneven all-to-all on several.

T tokens, D width, K choices, N rows sent (T K if all are), R rows at their experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.sparse.collectives import exchange_rows
from moe.sparse.plan import ExpertLayout, Plan


class Dispatcher:
    """Sends what the plan says, whatever the load; nothing is padded to a maximum."""

    def __init__(self, layout: ExpertLayout) -> None:
        self.layout = layout

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """[T, D] -> [R, D]: a row for each choice that falls on an expert here, sorted by expert."""
        rows_ND = x_TD.index_select(0, plan.token_of_row_N)
        if plan.arrival_order_R is None:
            return rows_ND
        rows_RD = exchange_rows(rows_ND, plan.send_splits, plan.receive_splits, self.layout.group)
        return _Permute.apply(rows_RD, plan.arrival_order_R)  # type: ignore[no-any-return]  # Function.apply is untyped

    def combine(self, rows_RD: Tensor, plan: Plan, weights_TK: Tensor) -> Tensor:
        """[R, D] -> [T, D]: bring rows home and sum each token's, weighted."""
        if plan.arrival_order_R is not None:
            rows_RD = _Permute.apply(rows_RD, _inverse(plan.arrival_order_R))
            rows_RD = exchange_rows(rows_RD, plan.receive_splits, plan.send_splits, self.layout.group)
        if plan.sent_TK is not None:
            weights_TK = weights_TK * plan.sent_TK
        weights_TK = weights_TK.to(rows_RD.dtype)
        return _WeightedSum.apply(rows_RD, plan.token_of_row_N, plan.row_of_choice_TK, weights_TK)  # type: ignore[no-any-return]  # Function.apply is untyped


class _Permute(torch.autograd.Function):
    """rows[order]; since order is a permutation, the gradient is a gather too, not a scatter-add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, _inverse(order)), None


class _WeightedSum(torch.autograd.Function):
    """y_t = sum_k w_tk rows[row_of_choice_tk], without a [T, K, D] temporary on the way."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, token_of_row_N: Tensor, row_of_choice_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_ND, token_of_row_N, row_of_choice_TK, weights_TK)
        if not rows_ND.shape[0]:  # nothing was sent
            return rows_ND.new_zeros(weights_TK.shape[0], rows_ND.shape[1])
        return F.embedding_bag(row_of_choice_TK, rows_ND, mode="sum", per_sample_weights=weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, Tensor]:
        rows_ND, token_of_row_N, row_of_choice_TK, weights_TK = ctx.saved_tensors
        if not rows_ND.shape[0]:
            return torch.empty_like(rows_ND), None, None, torch.zeros_like(weights_TK)
        grad_ND = grad_TD.index_select(0, token_of_row_N)
        grad_weights_TK = torch.linalg.vecdot(rows_ND, grad_ND)[row_of_choice_TK]
        # A choice that is not sent has weight 0 and adds nothing to the row it points at.
        weights_N = weights_TK.new_zeros(rows_ND.shape[0])
        weights_N.index_add_(0, row_of_choice_TK.reshape(-1), weights_TK.reshape(-1))
        return grad_ND.mul_(weights_N.unsqueeze(-1)), None, None, grad_weights_TK


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse
