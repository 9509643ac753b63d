"""Tokens to their experts and back by DeepEP's kernels over NVLink and RDMA (github.com/deepseek-ai/DeepEP).

T tokens, D width, K choices, M rows received.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moe.errors import ConfigError
from moe.sparse.copies import copies_of
from moe.sparse.experts import Rows
from moe.sparse.once import first_derivative_only
from moe.sparse.plan import ExpertLayout


class DeepEP:
    """The same journey as `AllToAll`'s: once to each rank a token needs, back as one sum; bf16 on CUDA alone."""

    def __init__(self, layout: ExpertLayout, buffer: Any) -> None:
        """`buffer` is a `deep_ep.Buffer`: one serves all layers, see `start`."""
        self.layout, self.buffer = layout, buffer

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, sent_TK: Tensor | None = None
    ) -> "_Away":
        if sent_TK is not None:
            ids_TK = ids_TK.masked_fill(~sent_TK, -1)
        handle = _Handle()
        source_MD, weights_MK, ids_MK = _Dispatch.apply(
            x_TD, weights_TK.float(), ids_TK, self.layout.num_experts, self.buffer, handle
        )
        held = self.layout.num_local_experts
        here_MK = ids_MK >= 0
        copies = copies_of(
            ids_MK.masked_fill(~here_MK, held), held, here_MK, lambda: sum(handle.rows_per_expert)
        )
        rows = Rows(source_MD, weights_MK.flatten()[copies.choice_of_row_R], copies)
        return _Away(rows, self.buffer, handle)


@dataclass(frozen=True)
class _Away:
    arrived: Rows
    buffer: Any
    handle: "_Handle"

    def rows(self) -> Rows:
        return self.arrived

    def combine(self, y_MD: Tensor) -> Tensor:
        y_TD: Tensor = _Combine.apply(y_MD, self.buffer, self.handle)
        return y_TD


class _Handle:
    """What one dispatch leaves for its way back."""

    def __init__(self) -> None:
        self.value: Any = None
        self.rows_per_expert: list[int] = []


class _Dispatch(torch.autograd.Function):
    """Its gradient is DeepEP's combine."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor,
        num_experts: int,
        buffer: Any,
        handle: _Handle,
    ) -> tuple[Tensor, Tensor, Tensor]:
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids_TK, num_experts)
        source_MD, ids_MK, weights_MK, handle.rows_per_expert, handle.value, _ = buffer.dispatch(
            x_TD.contiguous(),
            topk_idx=ids_TK,
            topk_weights=weights_TK,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(ids_MK)
        return source_MD, weights_MK, ids_MK

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_MD: Tensor, grad_MK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD, grad_TK, _event = ctx.buffer.combine(
            grad_MD.contiguous(), ctx.handle.value, topk_weights=grad_MK.float().contiguous()
        )
        return grad_TD, grad_TK, None, None, None, None


class _Combine(torch.autograd.Function):
    """Its gradient is DeepEP's dispatch along the same way."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, buffer: Any, handle: _Handle) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        y_TD: Tensor = buffer.combine(y_MD.contiguous(), handle.value)[0]
        return y_TD

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.buffer.dispatch(grad_TD.contiguous(), handle=ctx.handle.value)[0], None, None


def check_installed() -> None:
    """Raise `ConfigError` where DeepEP or the device it needs is missing."""
    missing = []
    if find_spec("deep_ep") is None:
        missing.append("the package deep_ep is not installed")
    if not torch.cuda.is_available():
        missing.append("there is no CUDA device")
    if missing:
        raise ConfigError(
            f"parallel.dispatch is deepep, but {' and '.join(missing)}: its kernels need both. Install DeepEP on a "
            f"machine with NVLink or RDMA (github.com/deepseek-ai/DeepEP), or set parallel.dispatch=all_to_all."
        )


def start(layout: ExpertLayout, width: int) -> DeepEP:
    """A dispatcher for tokens that travel `width` wide in bf16; one serves all layers. Collective."""
    from deep_ep import Buffer

    assert layout.group is not None, "checked by moe.config.rules: there is a group to travel in"
    ranks, row_bytes = layout.group.size(), 2 * width
    sizes = (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks))
    buffer = Buffer(
        layout.group,
        max(size.get_nvl_buffer_size_hint(row_bytes, ranks) for size in sizes),
        max(size.get_rdma_buffer_size_hint(row_bytes, ranks) for size in sizes),
    )
    return DeepEP(layout, buffer)
