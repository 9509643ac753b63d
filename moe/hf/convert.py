"""A model and its family's row -> the disk tensors that each logical tensor becomes, one after another."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import TYPE_CHECKING

from moe.config import ModelConfig
from moe.errors import ExportError
from moe.hf.family import Family, Name, meets, sizes

if TYPE_CHECKING:
    import torch

    Read = Callable[[str], Iterator[torch.Tensor]]
    """Logical name -> float32 tensors on CPU: the experts of a stacked one in order, or the whole of any other."""


@dataclass(frozen=True)
class Move:
    """One logical tensor and the disk tensors that its rows become, in order.

    It is read in pieces: the experts of a stacked one, or all of it. A piece becomes `blocks` disk tensors of its own,
    or a part of one that it shares with the other pieces (`packed`) or with other tensors (`part`).
    """

    ours: str
    shape: tuple[int, ...]
    disk: tuple[str, ...]
    disk_shape: tuple[int, ...]
    """The shape of each of `disk`; they are equal."""
    stacked: bool
    """Whether it is read expert by expert."""
    packed: bool = False
    """Whether one disk tensor holds all pieces."""
    order: tuple[int, ...] | None = None
    """Which row of a piece on disk each of our rows is; None: the same."""
    transposed: bool = False
    """Whether a piece on disk has rows as columns."""
    part: tuple[int, int] = (0, 1)
    """Which of how many equal blocks of the disk tensor's rows it is."""
    wide: bool = False
    """Whether it is float32 on disk whatever the weights are."""
    copy: bool = False
    """Whether it is a second home, which a folder may have or not."""

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

    @property
    def disk_numel(self) -> int:
        """Elements that are its own on disk."""
        return 0 if self.part[0] else len(self.disk) * prod(self.disk_shape)

    def keys(self, number: int) -> tuple[str, ...]:
        """The disk tensors with piece `number`."""
        if self.packed:
            return self.disk
        each = len(self.disk) // self.num_pieces
        return self.disk[number * each : (number + 1) * each]

    def to_disk(self, piece: "torch.Tensor") -> "torch.Tensor":
        """A piece of ours with its rows and columns as they are on disk; a view where nothing moves."""
        if self.order is not None:
            moved = piece.new_empty(piece.shape)
            moved[list(self.order)] = piece
            piece = moved
        return piece.t() if self.transposed else piece

    def from_disk(self, piece: "torch.Tensor") -> "torch.Tensor":
        """The undoing of `to_disk`."""
        if self.transposed:
            piece = piece.reshape(self.piece_shape[::-1]).t()
        piece = piece.reshape(self.piece_shape)
        return piece if self.order is None else piece[list(self.order)]

    def split(self, number: int, piece: "torch.Tensor") -> Iterator[tuple[str, "torch.Tensor"]]:
        """Piece `number` of ours, which has disk tensors of its own -> their names and rows."""
        names = self.keys(number)
        yield from zip(
            names, self.to_disk(piece).reshape(len(names), *self.disk_shape).unbind(0), strict=True
        )

    def join(self, parts: Sequence["torch.Tensor"]) -> "torch.Tensor":
        """The disk tensors of a piece, in order, whole or cut to what is the piece's -> the piece."""
        import torch

        return self.from_disk(parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts]))


def moves(family: Family, model: ModelConfig) -> list[Move]:
    """Every logical tensor of the model, layer by layer; raises `ExportError` if a name comes twice."""
    here = [name for name in family.names if all(meets(model, *pair) for pair in name.when.items())]
    found = [_move(name, model, {}) for name in here if name.layers == "none"]
    for layer in range(model.num_blocks):
        kind = "sparse" if layer in model.sparse_layers else "dense"
        depth = layer - model.num_layers
        for name in here:
            if name.layers in ("all", kind) or (name.layers == "prediction" and depth >= 0):
                found.append(_move(name, model, {"layer": layer, "depth": depth}))
    own = [move for move in found if not move.copy]
    for names in (
        [move.ours for move in own],
        [key for move in own if not move.part[0] for key in move.disk],
    ):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ExportError(f"{family.model_type} names {few(twice)} more than once: mend its row.")
    return found


def check_names(plan: list[Move], names: Collection[str]) -> None:
    """Raise `ExportError` unless the saved `names` are exactly those that the plan uses."""
    expected, present = {move.ours for move in plan}, set(names)
    if missing := sorted(expected - present):
        raise ExportError(
            f"the saved model lacks {few(missing)}, which its recipe calls for. Export a step that was saved "
            f"whole, with the recipe it was trained with."
        )
    if unknown := sorted(present - expected):
        raise ExportError(
            f"the saved model holds {few(unknown)}, which its recipe does not call for: the export would drop "
            f"them. Export it with the recipe it was trained with."
        )


def disk_tensors(plan: list[Move], read: "Read") -> Iterator[tuple[str, "torch.Tensor"]]:
    """Disk names and float32 tensors in the order of the plan, reading each piece of a logical tensor once.

    The tensors are views of the piece just read, and nothing else is held, but for disk tensors that hold several
    pieces. Raises `ExportError`: another shape than the recipe's, or values that are not finite.
    """
    import torch

    shared: list[torch.Tensor] = []
    for move in plan:
        together: torch.Tensor | None = None
        number = 0  # enumerate would hold the piece while the next is read
        for piece in _checked(move, read):
            if move.packed:
                together = (
                    piece.new_empty(move.num_pieces, prod(move.piece_shape)) if together is None else together
                )
                together[number] = move.to_disk(piece).flatten()
            elif move.part[1] > 1:
                shared.append(move.to_disk(piece))
            else:
                yield from move.split(number, piece)
            number += 1  # noqa: SIM113
            del piece  # else it would be held too
        if together is not None:
            yield move.disk[0], together.view(move.disk_shape)
        if len(shared) == move.part[1] > 1:
            yield move.disk[0], torch.cat(shared).view(move.disk_shape)
            shared = []


def _checked(move: Move, read: "Read") -> Iterator["torch.Tensor"]:
    number = 0
    for piece in read(move.ours):
        if number == move.num_pieces or tuple(piece.shape) != move.piece_shape:
            raise _misshapen(move, number + 1, tuple(piece.shape))
        # Of all reductions this one needs no second tensor of that size, and it hands NaN on.
        if not all(isfinite(extreme) for extreme in piece.aminmax()):
            raise ExportError(
                f"{move.ours} holds values that are not finite: the run diverged. Export an earlier --step."
            )
        yield piece
        number += 1
        del piece
    if number < move.num_pieces:
        raise _misshapen(move, number, move.piece_shape)


def _move(name: Name, model: ModelConfig, place: dict[str, int]) -> Move:
    size = sizes(model)
    shape = tuple(size[letter] for letter in name.shape)
    per_expert = "{expert}" in name.disk[0]
    stacked = per_expert or (name.shape[0] == "E" and ".experts." in name.ours)
    disk = tuple(
        key.format(**place, expert=expert)
        for expert in range(shape[0] if per_expert else 1)
        for key in name.disk
    )
    piece = shape[1:] if stacked else shape
    if name.transposed:
        piece = piece[::-1]
    rows, *columns = piece
    each = (rows * name.part[1] // len(name.disk), *columns)
    packed = stacked and not per_expert
    if packed:
        each = (shape[0], *piece)
    if name.disk_shape is not None:
        each = tuple(size[letter] for letter in name.disk_shape)
    ours = name.ours.format(**place)
    if place.get("depth", -1) >= 0 and name.layers != "prediction":
        # The blocks of prediction modules have the names of layers that come after the last.
        ours = ours.replace(f"layers.{place['layer']}.", f"predictions.{place['depth']}.block.", 1)
    order = None if name.order is None else tuple(name.order(model))
    return Move(
        ours, shape, disk, each, stacked, packed, order, name.transposed, name.part, name.wide, name.copy
    )


def _misshapen(move: Move, pieces: int, shape: tuple[int, ...]) -> ExportError:
    found = [pieces, *shape] if move.stacked else list(shape)
    return ExportError(
        f"{move.ours} is saved with shape {found}, but the recipe makes it {list(move.shape)}. "
        f"Export it with the recipe it was trained with."
    )


def few(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
