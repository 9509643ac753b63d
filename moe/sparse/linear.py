"""A linear map, multiplied as a CPU does it fastest: in which dtype and by which library, `Products` knows.

D width in, F width out, N all that is mapped.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.sparse.product import Products


class Linear(nn.Linear):
    """`nn.Linear`, with nothing wider kept for backward."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        return linear_map(x, self.weight, self.bias)


def linear_map(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """[..., D] -> [..., F]: x W^T + b. Autocast is torch's to do."""
    products = Products.of(x, x.shape[:-1].numel(), weight_FD)
    usual = products == Products(x.dtype) or x.dtype != weight_FD.dtype
    if usual or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight_FD, bias_F)
    y: Tensor = LinearFunction.apply(x, weight_FD, bias_F, products)
    return y


class LinearFunction(torch.autograd.Function):
    """x W^T + b by `products`, rounded at the end; so with the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_FD: Tensor, bias_F: Tensor | None, products: Products) -> Tensor:
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight_FD if needs_x else None)
        ctx.products, ctx.shape, ctx.dtypes = products, x.shape, (x.dtype, weight_FD.dtype)
        y_NF = products.multiply(_rows(x).to(products.dtype), weight_FD.to(products.dtype).t())
        if bias_F is not None:
            y_NF += bias_F.to(products.dtype)
        return y_NF.to(x.dtype).view(*x.shape[:-1], y_NF.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_FD = ctx.saved_tensors
        products: Products = ctx.products.for_backward()
        needs_bias = ctx.needs_input_grad[2]
        dtype, weight_dtype = ctx.dtypes
        grad_NF = _rows(grad).to(products.dtype)
        grad_x = grad_weight = None
        if weight_FD is not None:
            grad_x = products.multiply(grad_NF, weight_FD.to(products.dtype)).to(dtype).view(ctx.shape)
        if x is not None:
            grad_weight = products.multiply(grad_NF.t(), _rows(x).to(products.dtype)).to(weight_dtype)
        grad_bias = grad_NF.sum(0).to(weight_dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
