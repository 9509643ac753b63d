"""A linear map multiplied as a CPU does it fastest: bf16 in float32 where it has no units, float32 by oneDNN or not.

D width in, F width out, N all that is mapped.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe.sparse.once import first_derivative_only
from moe.sparse.product import Products


class Linear(nn.Linear):
    """`nn.Linear`, with nothing wider kept for backward."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """[..., D] -> [..., F]: x W^T + b."""
    products = Products.of(x, x.shape[:-1].numel(), weight_FD)
    if products == Products(x.dtype):
        return nn.functional.linear(x, weight_FD, bias_F)
    y: Tensor = LinearFunction.apply(x, weight_FD, bias_F, products)
    return y


class LinearFunction(torch.autograd.Function):
    """x W^T + b by `products`, rounded at the end; so with the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_FD: Tensor, bias_F: Tensor | None, products: Products) -> Tensor:
        ctx.save_for_backward(x, weight_FD)
        ctx.products = products
        x_ND = _rows(x).to(products.dtype)
        y_NF = products.multiply(x_ND, weight_FD.to(products.dtype).t())
        if bias_F is not None:
            y_NF += bias_F.to(products.dtype)
        return y_NF.to(x.dtype).view(*x.shape[:-1], y_NF.shape[1])

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_FD = ctx.saved_tensors
        products: Products = ctx.products
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_NF = _rows(grad).to(products.dtype)
        grad_x = grad_weight = None
        if needs_x:
            grad_x = products.multiply(grad_NF, weight_FD.to(products.dtype)).to(x.dtype).view(x.shape)
        if needs_weight:
            grad_weight = products.multiply(grad_NF.t(), _rows(x).to(products.dtype)).to(weight_FD.dtype)
        grad_bias = grad_NF.sum(0).to(weight_FD.dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
