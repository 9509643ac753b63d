"""A model -> the matrices that Muon orthogonalises, one by one.

e experts held here, F expert width, D width.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from moe.model.head import Head
from moe.sparse.experts import Experts
from moe.sparse.lora import pairs
from moe.sparse.router import Router


@dataclass(frozen=True)
class Stack:
    """A parameter's memory as equal matrices, one after the other."""

    count: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Elements of one matrix."""
        return self.rows * self.columns


def vectors(model: nn.Module) -> set[Tensor]:
    """Norms and biases; those of stacked experts too, which only look like a matrix [e, F]."""
    # Cut in pieces by ZeRO 3, a parameter is flat, and ds_shape says what it was.
    found: set[Tensor] = {p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) < 2}
    for module in model.modules():
        if isinstance(module, Experts):
            found.update(bias for bias in (module.gate_up_bias, module.down_bias) if bias is not None)
    return found


def stacks(model: nn.Module) -> dict[Tensor, Stack]:
    """The parameters that Muon trains, each as the matrices it is made of.

    Orthogonalising [e, 2F, D] whole, or gate and up together, would tie experts to each other: a stacked or fused
    weight must train as its parts would. Not here, and so AdamW's: embedding and head, as in arXiv:2502.16982
    (section 2.2), vectors, and matrices of one row or column. The router is here, as in the models of that paper
    (section 3.4).
    """
    found: dict[Tensor, Stack] = {}
    left = vectors(model)
    for module in model.modules():
        for half in (half for _, *halves in pairs(module) for half in halves):
            count, rows, columns = (1, *half.shape)[-3:]
            if min(rows, columns) > 1:
                found[half] = Stack(count, rows, columns)
            else:
                left.add(half)
        match module:
            case Experts():
                experts, hidden, width = module.down.shape
                found[module.gate_up] = Stack(2 * experts, width, hidden)  # gate above up, [F, D] each
                found[module.down] = Stack(experts, hidden, width)
            case nn.Embedding() | Head():
                left.add(module.weight)
            case nn.Linear() | Router():
                if min(module.weight.shape) > 1:
                    found[module.weight] = Stack(1, *module.weight.shape)
                else:
                    left.add(module.weight)
    missed = [
        name
        for name, parameter in model.named_parameters()
        if parameter not in found and parameter not in left
    ]
    assert not missed, f"no rule says of which matrices {missed} are made"
    assert all(parameter.numel() == stack.count * stack.size for parameter, stack in found.items())
    return found
