"""The last hidden states -> logits, or straight to the cross-entropy without holding them all.

T tokens, D width, V vocabulary, C tokens in a chunk.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe.sparse.linear import linear_map
from moe.sparse.once import first_derivative_only
from moe.sparse.product import Products

CHUNK_ELEMENTS = 1 << 24
"""Logits held at a time: 64 MiB in float32, whatever the batch and the vocabulary."""


class Head(nn.Module):
    """Projection to the vocabulary; with labels, the summed cross-entropy of unmasked tokens."""

    def __init__(self, hidden_size: int, vocab_size: int, bias: bool = False, divisor: float = 1.0) -> None:
        """Logits are divided by `divisor`."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(vocab_size)) if bias else None
        self.divisor = divisor

    def forward(self, h: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[..., D] -> logits [..., V]; or, with int64 `labels` [...], a float32 scalar: nats, summed.

        Tokens whose `mask` (bool [...]) is False, or whose label is negative, add nothing.
        """
        bias: Tensor | None = self.bias
        if self.divisor != 1:
            h = h / self.divisor
            bias = None if bias is None else bias / self.divisor
        if labels is None:
            return linear_map(h, self.weight, bias)
        kept = labels >= 0 if mask is None else mask & (labels >= 0)
        # Asked here: inside a Function's forward, gradients are always off and needs_input_grad ignores no_grad.
        backward = torch.is_grad_enabled() and (h.requires_grad or self.weight.requires_grad)
        loss: Tensor = _LinearCrossEntropy.apply(
            h.flatten(0, -2),
            self.weight,
            bias,
            labels.clamp(min=0).flatten(),
            kept.flatten(),
            backward,
            Products.of(h, labels.numel(), self.weight),
        )
        return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_t -log softmax(W h_t + b)[label_t], chunk by chunk, with its gradients made on the way.

    The loss is linear in the gradient that comes back, so both gradients can be formed while a chunk's logits
    are at hand, and only [T, D], [V, D] and [V] are kept (as Liger Kernel does, arXiv:2410.10989, section 3.2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        mask_T: Tensor,
        backward: bool,
        products: Products,
    ) -> Tensor:
        wide = torch.promote_types(h_TD.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=h_TD.device)
        grad_h_TD = torch.empty_like(h_TD) if backward else None
        trained = backward and weight_VD.requires_grad
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if trained else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if trained and bias_V is not None else None
        factor_VD = weight_VD.to(products.dtype)
        chunk = max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
        for start in range(0, h_TD.shape[0], chunk):
            here = slice(start, start + chunk)
            h_CD, labels_C1 = h_TD[here].to(products.dtype), labels_T[here].unsqueeze(1)
            mask_C1 = mask_T[here].unsqueeze(1).to(wide)
            logits_CV = products.multiply(h_CD, factor_VD.t()).to(wide)
            if bias_V is not None:
                logits_CV += bias_V
            log_sum_exp_C1 = torch.logsumexp(logits_CV, dim=1, keepdim=True)
            total += ((log_sum_exp_C1 - logits_CV.gather(1, labels_C1)) * mask_C1).sum()
            if grad_h_TD is None:
                continue
            grad_CV = logits_CV.sub_(log_sum_exp_C1).exp_()
            grad_CV.scatter_add_(1, labels_C1, -torch.ones_like(mask_C1)).mul_(mask_C1)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(products.dtype)
            grad_h_TD[here] = products.multiply(grad_CV, factor_VD)
            if grad_weight_VD is not None:
                products.add(grad_CV.t(), h_CD, grad_weight_VD)
        if backward:
            ctx.save_for_backward(grad_h_TD, grad_weight_VD, grad_bias_V)
            ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h_TD, grad_weight_VD, grad_bias_V = ctx.saved_tensors
        return (
            grad_h_TD * grad.to(grad_h_TD.dtype),
            None if grad_weight_VD is None else (grad_weight_VD * grad).to(ctx.weight_dtype),
            None if grad_bias_V is None else (grad_bias_V * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )
