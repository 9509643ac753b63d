"""The last hidden states -> logits, or straight to the cross-entropy without holding them all.

T tokens, D width, V vocabulary, C tokens in a chunk.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe.sparse.product import product_dtype

CHUNK_ELEMENTS = 1 << 24
"""Logits held at a time: 64 MiB in float32, whatever the batch and the vocabulary."""


class Head(nn.Module):
    """Projection to the vocabulary; with labels, the summed cross-entropy of unmasked tokens."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, h: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[..., D] -> logits [..., V]; or, with int64 `labels` [...], a float32 scalar: nats, summed.

        Tokens whose `mask` (bool [...]) is False, or whose label is negative, add nothing.
        """
        if labels is None:
            return h @ self.weight.t()
        kept = labels >= 0 if mask is None else mask & (labels >= 0)
        # Asked here: inside a Function's forward, gradients are always off and needs_input_grad ignores no_grad.
        backward = torch.is_grad_enabled() and (h.requires_grad or self.weight.requires_grad)
        loss: Tensor = _LinearCrossEntropy.apply(
            h.flatten(0, -2),
            self.weight,
            labels.clamp(min=0).flatten(),
            kept.flatten(),
            backward,
            product_dtype(h),
        )
        return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_t -log softmax(W h_t)[label_t], chunk by chunk, with its gradients made on the way.

    The loss is linear in the gradient that comes back, so both gradients can be formed while a chunk's logits
    are at hand, and only [T, D] and [V, D] are kept (as Liger Kernel does, arXiv:2410.10989, section 3.2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        mask_T: Tensor,
        backward: bool,
        product_dtype: torch.dtype,
    ) -> Tensor:
        wide = torch.promote_types(h_TD.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=h_TD.device)
        grad_h_TD = torch.empty_like(h_TD) if backward else None
        trained = backward and weight_VD.requires_grad
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if trained else None
        factor_VD = weight_VD.to(product_dtype)
        chunk = max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
        for start in range(0, h_TD.shape[0], chunk):
            here = slice(start, start + chunk)
            h_CD, labels_C1 = h_TD[here].to(product_dtype), labels_T[here].unsqueeze(1)
            mask_C1 = mask_T[here].unsqueeze(1).to(wide)
            logits_CV = (h_CD @ factor_VD.t()).to(wide)
            log_sum_exp_C1 = torch.logsumexp(logits_CV, dim=1, keepdim=True)
            total += ((log_sum_exp_C1 - logits_CV.gather(1, labels_C1)) * mask_C1).sum()
            if grad_h_TD is None:
                continue
            grad_CV = logits_CV.sub_(log_sum_exp_C1).exp_()
            grad_CV.scatter_add_(1, labels_C1, -torch.ones_like(mask_C1)).mul_(mask_C1)
            grad_CV = grad_CV.to(product_dtype)
            grad_h_TD[here] = grad_CV @ factor_VD
            if grad_weight_VD is None:
                continue
            if wide == product_dtype:
                grad_weight_VD.addmm_(grad_CV.t(), h_CD)
            else:
                grad_weight_VD += grad_CV.t() @ h_CD
        if backward:
            ctx.save_for_backward(grad_h_TD, grad_weight_VD)
            ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        grad_h_TD, grad_weight_VD = ctx.saved_tensors
        return (
            grad_h_TD * grad.to(grad_h_TD.dtype),
            None if grad_weight_VD is None else (grad_weight_VD * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )
