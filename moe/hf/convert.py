"""A model and its family's row -> the disk tensors that each logical tensor becomes, one after another."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import isfinite, prod
from typing import TYPE_CHECKING

from moe.config import ModelConfig
from moe.errors import ExportError
from moe.hf.families import Family, Name, sizes

if TYPE_CHECKING:
    import torch

    Read = Callable[[str], Iterator[torch.Tensor]]
    """Logical name -> float32 tensors on CPU: the experts of a stacked one in order, or the whole of any other."""


@dataclass(frozen=True)
class Move:
    """One logical tensor and the disk tensors that its rows become, in order.

    An expert tensor `[E, rows, columns]` gives E x blocks of rows, expert by expert; any other gives itself.
    """

    ours: str
    shape: tuple[int, ...]
    disk: tuple[str, ...]
    disk_shape: tuple[int, ...]
    """The shape of each of `disk`; they are equal."""
    stacked: bool
    """Whether it is read expert by expert."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def num_pieces(self) -> int:
        """How many tensors it is read as."""
        return self.shape[0] if self.stacked else 1

    @property
    def piece_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape

    def split(self, number: int, piece: "torch.Tensor") -> Iterator[tuple[str, "torch.Tensor"]]:
        """Piece `number` of ours -> disk names and views of their rows."""
        each = len(self.disk) // self.num_pieces
        names = self.disk[number * each : (number + 1) * each]
        yield from zip(names, piece.reshape(each, *self.disk_shape).unbind(0), strict=True)

    def join(self, parts: list["torch.Tensor"]) -> "torch.Tensor":
        """The undoing of `split`: the tensors of `disk`, in order -> ours."""
        import torch

        return torch.stack(parts).reshape(self.shape)


def moves(family: Family, model: ModelConfig) -> list[Move]:
    """Every logical tensor of the model, layer by layer; raises `ExportError` if a name comes twice."""
    whole = [name for name in family.names if name.layers == "none"]
    layered = [name for name in family.names if name.layers != "none"]
    found = [_move(name, model, 0) for name in whole if not (name.only_untied and model.tie_embeddings)]
    for layer in range(model.num_layers):
        kind = "sparse" if layer in model.sparse_layers else "dense"
        found += [_move(name, model, layer) for name in layered if name.layers in ("all", kind)]
    for names in ([move.ours for move in found], [key for move in found for key in move.disk]):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ExportError(f"{family.model_type} names {_few(twice)} more than once: mend its row.")
    return found


def check_names(plan: list[Move], names: Collection[str]) -> None:
    """Raise `ExportError` unless the saved `names` are exactly those that the plan uses."""
    expected, present = {move.ours for move in plan}, set(names)
    if missing := sorted(expected - present):
        raise ExportError(
            f"the saved model lacks {_few(missing)}, which its recipe calls for. Export a step that was saved "
            f"whole, with the recipe it was trained with."
        )
    if unknown := sorted(present - expected):
        raise ExportError(
            f"the saved model holds {_few(unknown)}, which its recipe does not call for: the export would drop "
            f"them. Export it with the recipe it was trained with."
        )


def disk_tensors(plan: list[Move], read: "Read") -> Iterator[tuple[str, "torch.Tensor"]]:
    """Disk names and float32 tensors in the order of the plan, reading each piece of a logical tensor once.

    The tensors are views of the piece just read; nothing else is held. Raises `ExportError`: another shape than the
    recipe's, or values that are not finite.
    """
    for move in plan:
        number = 0
        for piece in read(move.ours):
            if number == move.num_pieces or tuple(piece.shape) != move.piece_shape:
                raise _misshapen(move, number + 1, tuple(piece.shape))
            # Of all reductions this one needs no second tensor of that size, and it hands NaN on.
            if not all(isfinite(extreme) for extreme in piece.aminmax()):
                raise ExportError(
                    f"{move.ours} holds values that are not finite: the run diverged. Export an earlier --step."
                )
            yield from move.split(number, piece)
            number += 1
            del piece  # else it would be held while the next is read
        if number < move.num_pieces:
            raise _misshapen(move, number, move.piece_shape)


def _move(name: Name, model: ModelConfig, layer: int) -> Move:
    size = sizes(model)
    shape = tuple(size[letter] for letter in name.shape)
    per_expert = "{expert}" in name.disk[0]
    experts = range(shape[0] if per_expert else 1)
    disk = tuple(key.format(layer=layer, expert=expert) for expert in experts for key in name.disk)
    rows, *columns = shape[1:] if per_expert else shape
    return Move(name.ours.format(layer=layer), shape, disk, (rows // len(name.disk), *columns), per_expert)


def _misshapen(move: Move, pieces: int, shape: tuple[int, ...]) -> ExportError:
    found = [pieces, *shape] if move.stacked else list(shape)
    return ExportError(
        f"{move.ours} is saved with shape {found}, but the recipe makes it {list(move.shape)}. "
        f"Export it with the recipe it was trained with."
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
