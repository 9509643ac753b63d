"""Frozen weights -> weights with trained low-rank adapters on them, W + scale B A (arXiv:2106.09685).

M sources, R rows at their experts, e experts held here, D width in, F width out, r rank.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.sparse.copies import Copies, copy_rows, sum_rows
from moe.sparse.experts import Experts, Rows
from moe.sparse.grouped import fits
from moe.sparse.linear import Linear, linear_map
from moe.sparse.product import product_dtype

A, B = "_lora_a", "_lora_b"
"""What the names of adapters end in, after the name of the weight that they adapt."""


class AdaptedLinear(Linear):
    """A `Linear` with an adapter, which is applied to the input: the sum is never formed. Made by `adapt_linear`."""

    weight_lora_a: nn.Parameter
    """[r, D]."""
    weight_lora_b: nn.Parameter
    """[F, r]."""
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        low = linear_map(x, self.weight_lora_a)
        return super().forward(x) + linear_map(low, self.weight_lora_b) * self.lora_scale


class AdaptedExperts(Experts):
    """`Experts` with adapters on both weights, a pair for every expert. Made by `adapt_experts`."""

    gate_up_lora_a: nn.Parameter
    """[e, r, D]."""
    gate_up_lora_b: nn.Parameter
    """[e, 2F, r]."""
    down_lora_a: nn.Parameter
    """[e, r, F]."""
    down_lora_b: nn.Parameter
    """[e, D, r]."""
    lora_scale: float

    def forward(self, rows: Rows) -> Tensor:
        """As `Experts.forward`. No gradient of a frozen weight is made."""
        if not (self.recompute and torch.is_grad_enabled()):
            return self._forward(rows.source_MD, rows.weights_R, rows.copies)
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        y_MD: Tensor = again(self._forward, rows.source_MD, rows.weights_R, rows.copies)
        return y_MD

    def _forward(self, source_MD: Tensor, weights_R: Tensor, copies: Copies) -> Tensor:
        x_RD = copy_rows(source_MD, copies)
        expert_of_row_R = None if self.gate_up_bias is None else _expert_of_row(copies)
        both_R2F = self._product(x_RD, self.gate_up, self.gate_up_lora_a, self.gate_up_lora_b, copies)
        if self.gate_up_bias is not None:
            both_R2F = both_R2F + self.gate_up_bias[expert_of_row_R]
        h_RF = self.unit(both_R2F)
        y_RD = self._product(h_RF, self.down, self.down_lora_a, self.down_lora_b, copies)
        if self.down_bias is not None:
            y_RD = y_RD + self.down_bias[expert_of_row_R]
        return sum_rows(y_RD * weights_R.unsqueeze(1).to(y_RD.dtype), copies)

    def _product(self, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, copies: Copies) -> Tensor:
        low = stacked_linear(x, a, copies)
        return stacked_linear(x, weight, copies) + stacked_linear(low, b, copies) * self.lora_scale


def adapt_linear(linear: Linear, rank: int, scale: float) -> None:
    """Freeze `linear` and give it an adapter, uninitialised, in place: names of weights stay as they are."""
    _adopt(linear, AdaptedLinear, scale)
    _add(linear, "weight", rank)


def adapt_experts(experts: Experts, rank: int, scale: float) -> None:
    """The same for the stacked weights of experts."""
    _adopt(experts, AdaptedExperts, scale)
    _add(experts, "gate_up", rank)
    _add(experts, "down", rank)


def pairs(module: nn.Module) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """(name of the weight, A, B) for each adapter right in this module."""
    names = [name for name, _ in module.named_parameters(recurse=False) if name.endswith(A)]
    weights = [name.removesuffix(A) for name in names]
    return [(name, getattr(module, name + A), getattr(module, name + B)) for name in weights]


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is half of an adapter."""
    return name.endswith((A, B))


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A of one matrix; a new tensor in the dtype of `weight`."""
    return torch.addmm(weight, b, a, alpha=scale)


def stacked_linear(x_RD: Tensor, weight_eFD: Tensor, copies: Copies) -> Tensor:
    """[R, D] -> [R, F]: each expert's rows by its matrix; gradients only of what needs one."""
    y_RF: Tensor = _StackedLinear.apply(x_RD, weight_eFD, copies)
    return y_RF


class _StackedLinear(torch.autograd.Function):
    """Keeps the parameter itself for backward, no view of it: ZeRO 3 takes its memory away in between."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_eFD: Tensor, copies: Copies) -> Tensor:
        ctx.save_for_backward(x_RD, weight_eFD)
        ctx.copies = copies
        return _by_expert(x_RD, weight_eFD.transpose(1, 2), copies)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RD, weight_eFD = ctx.saved_tensors
        copies: Copies = ctx.copies
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_RF = grad_RF.contiguous()
        grad_x_RD = _by_expert(grad_RF, weight_eFD, copies) if needs_x else None
        return grad_x_RD, _outer(grad_RF, x_RD, weight_eFD, copies) if needs_weight else None, None


def _by_expert(x_RD: Tensor, weight_eDF: Tensor, copies: Copies) -> Tensor:
    """[R, D] -> [R, F]."""
    if _in_one_kernel(x_RD, weight_eDF):
        return F.grouped_mm(x_RD, weight_eDF, offs=_ends(copies))
    y_RF = x_RD.new_empty(x_RD.shape[0], weight_eDF.shape[2])
    wide = product_dtype(x_RD)
    for e, here in _slices(copies):
        y_RF[here] = x_RD[here].to(wide) @ weight_eDF[e].to(wide)
    return y_RF


def _outer(grad_RF: Tensor, x_RD: Tensor, weight_eFD: Tensor, copies: Copies) -> Tensor:
    """[e, F, D]: the gradient of the stacked weight; zero for an expert without rows."""
    if _in_one_kernel(x_RD, weight_eFD):
        return F.grouped_mm(grad_RF.t(), x_RD, offs=_ends(copies))
    grad_eFD, wide = torch.zeros_like(weight_eFD), product_dtype(x_RD)
    for e, here in _slices(copies):
        grad_eFD[e] = grad_RF[here].t().to(wide) @ x_RD[here].to(wide)
    return grad_eFD


def _in_one_kernel(x_RD: Tensor, weight: Tensor) -> bool:
    return fits(x_RD, weight, weight.transpose(1, 2))


def _ends(copies: Copies) -> Tensor:
    return copies.counts.cumsum(0).to(torch.int32)


def _slices(copies: Copies) -> list[tuple[int, slice]]:
    """(expert, its rows), where it has any."""
    found, start = [], 0
    for expert, count in enumerate(copies.rows_per_bucket):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found


def _expert_of_row(copies: Copies) -> Tensor:
    experts = torch.arange(copies.counts.numel(), device=copies.counts.device)
    return experts.repeat_interleave(copies.counts, output_size=copies.choice_of_row_R.numel())


def _adopt(module: nn.Module, cls: type[nn.Module], scale: float) -> None:
    # A class of its own, in place: the same module under the same name, with the same weights.
    module.__class__ = cls
    module.lora_scale = scale  # type: ignore[assignment]  # nn.Module's __setattr__ is for tensors and modules
    module.requires_grad_(False)


def _add(module: nn.Module, name: str, rank: int) -> None:
    weight: Tensor = getattr(module, name)
    *stack, rows, columns = weight.shape
    for end, shape in ((A, (*stack, rank, columns)), (B, (*stack, rows, rank))):
        module.register_parameter(name + end, nn.Parameter(weight.new_empty(shape)))
