"""Weights by logical name, wherever they are kept -> the parameters of a model that stand here."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.errors import CheckpointError
from moe.model.head import Head
from moe.model.transformer import Transformer
from moe.sparse.experts import Experts
from moe.sparse.lora import is_adapter


class Weights(Protocol):
    """The weights and buffers of a model, read when they are asked for; a folder or a checkpoint."""

    @property
    def model(self) -> ModelConfig:
        """The switches that they belong to."""
        ...

    def names(self) -> list[str]:
        """As `Transformer` names its parameters and buffers, a weight that is tied to another left out."""
        ...

    def pieces(self, name: str, only: range | None = None) -> Iterator[Tensor]:
        """float32 on the CPU: the experts of a stacked weight one by one (`only` those), or the whole of any other."""
        ...


class Held:
    """The weights of a whole model in memory, as a folder would hand them out."""

    def __init__(self, transformer: Transformer) -> None:
        self.model = transformer.config
        self._tensors = dict((*transformer.named_parameters(), *transformer.named_buffers()))
        experts = {name for name, module in transformer.named_modules() if isinstance(module, Experts)}
        self._stacked = {name for name in self._tensors if name.rpartition(".")[0] in experts}

    def names(self) -> list[str]:
        """Of parameters and buffers."""
        return list(self._tensors)

    def pieces(self, name: str, only: range | None = None) -> Iterator[Tensor]:
        """Copies where a dtype or a device differs, else views."""
        whole = self._tensors[name].detach()
        parts = whole.unbind(0) if name in self._stacked else (whole,)
        return (part.float().cpu() for part in (parts if only is None else parts[only.start : only.stop]))


@torch.no_grad()
def copy(part: nn.Module, place: str, weights: Weights) -> None:
    """Fill, in place, the parameters and buffers of a model's part that stands at `place` ("": the whole model).

    Of experts only those held here are read, one at a time. Raises `CheckpointError`: another shape than the part's.
    """
    for name, module in part.named_modules(prefix=place):
        tied = isinstance(module, Head) and weights.model.tie_embeddings
        only = module.layout.local_experts if isinstance(module, Experts) else None
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for key, tensor in own:
            if not (tied and key == "weight") and not is_adapter(key):  # the embedding's, or filled otherwise
                _fill(tensor, f"{name}.{key}", weights, only)


def materialize(
    part: nn.Module, device: torch.device, dtype: torch.dtype, made: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Replace what is on the meta device: weights uninitialised, buffers zero, as selection biases begin.

    `made` remembers, so that a weight which two parts share stays one.
    """
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                fresh = nn.Parameter(empty, parameter.requires_grad)
                vars(fresh).update(vars(parameter))  # DeepSpeed's marks
                made[parameter] = fresh
            setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=device))


def _fill(tensor: Tensor, name: str, weights: Weights, only: range | None) -> None:
    homes = [tensor] if only is None else list(tensor)
    pieces = weights.pieces(name, only)
    for home in homes:
        piece = next(pieces, None)  # zip would hold the one before meanwhile
        if piece is None or piece.shape != home.shape:  # copy_ would spread a smaller one
            raise _misshapen(name, tensor)
        home.copy_(piece)
        del piece
    if next(pieces, None) is not None:
        raise _misshapen(name, tensor)


def _misshapen(name: str, tensor: Tensor) -> CheckpointError:
    return CheckpointError(
        f"{name} does not have the shape {list(tensor.shape)} that the model has there. Use the model section that "
        f"the weights belong to."
    )
