"""A linear map whose bf16 is multiplied in float32 on CPUs without units for bf16.

D width in, F width out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.sparse.product import product_dtype


class Linear(nn.Linear):
    """`nn.Linear`, with nothing wider kept for backward."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        products = product_dtype(x)
        if products == x.dtype:
            return super().forward(x)
        y: Tensor = WideLinear.apply(x, self.weight, self.bias, products)
        return y


class WideLinear(torch.autograd.Function):
    """x W^T + b in `product_dtype`, rounded at the end; so with the gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_FD: Tensor, bias_F: Tensor | None, product_dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight_FD)
        ctx.product_dtype = product_dtype
        bias = None if bias_F is None else bias_F.to(product_dtype)
        return F.linear(x.to(product_dtype), weight_FD.to(product_dtype), bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_FD = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        wide = grad.to(ctx.product_dtype)
        grad_x = (wide @ weight_FD.to(wide.dtype)).to(x.dtype) if needs_x else None
        wide_NF = wide.flatten(0, -2)
        grad_weight = None
        if needs_weight:
            grad_weight = (wide_NF.t() @ x.flatten(0, -2).to(wide.dtype)).to(weight_FD.dtype)
        grad_bias = wide_NF.sum(0).to(weight_FD.dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None
