"""A dense model's weights -> a sparse model's, made when they are asked for, one expert at a time.

L layers, D width, I inner width of the dense feed-forward block, S of it shared, G shards, W = (I - S) / G inner width
of an expert, E experts.

Expert e holds shard e mod G of the block's columns after the first S, and the G experts from a multiple of G on are a
virtual group: their rows of the router are equal, so a token chooses whole groups and weighs the shards of a group
equally. Normalised weights add up to 1, so with down times G (and nothing else scaled: the product of gate and up is
not linear in both) the sum over shards is the dense block, whatever the router says.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from moe import seed
from moe.config import ModelConfig
from moe.hf.convert import moves
from moe.hf.targets import Options, target

if TYPE_CHECKING:
    from torch import Tensor

_PLACE = re.compile(r"layers\.(\d+)\.ffn\.(.+)")


class Weights(Protocol):
    """A model on a disk somewhere."""

    @property
    def model(self) -> ModelConfig: ...

    def names(self) -> list[str]:
        """Logical names."""
        ...

    def pieces(self, name: str) -> "Iterator[Tensor]":
        """float32 on CPU: the experts of a stacked parameter in order, or the whole of any other."""
        ...


class Upcycled:
    """The sparse model that `options` make of `dense`: `Weights` too, the same at every call."""

    def __init__(self, dense: Weights, options: Options) -> None:
        """Raises `ConfigError` as `target` does; reads nothing."""
        self.dense = dense
        self.options = options
        self.family, self.model = target(dense.model, options)

    def names(self) -> list[str]:
        """Logical names of the sparse model, in the order in which reading is cheapest."""
        return [move.ours for move in moves(self.family, self.model)]

    def pieces(self, name: str, only: range | None = None) -> "Iterator[Tensor]":
        """float32 on CPU: the experts of a stacked parameter, all in order or `only` those, or the whole of any other.

        Two matrices of a dense block and one expert are held.
        """
        found = _PLACE.fullmatch(name)
        if found is None or int(found[1]) not in self.model.sparse_layers:
            yield from self.dense.pieces(name)
            return
        layer, part = int(found[1]), found[2]
        assert self.model.moe is not None, "it has sparse layers"
        experts = range(self.model.moe.num_experts) if only is None else only
        match part.split("."):
            case ["router", "weight"]:
                yield self._router(layer)
            case ["router", _]:
                yield self._zeros(self.model.moe.num_experts)  # biases
            case ["experts", "gate_up"]:
                yield from self._gate_up(layer, experts)
            case ["experts", "down"]:
                yield from self._down(layer, experts)
            case ["shared_expert", matrix, "weight"]:
                yield self._shared(layer, matrix)
            case ["shared_expert_gate", "weight"]:
                yield self._zeros(1, self.model.hidden_size)  # a sigmoid of 1/2, which `_shared` makes up for
            case _:
                raise AssertionError(f"no rule makes {name}")

    def _router(self, layer: int) -> "Tensor":
        """[E, D]: a row drawn for each virtual group, and repeated in it."""
        import torch

        options = self.options
        std = self.model.init_std if options.router_std is None else options.router_std
        groups = options.num_experts // options.granularity
        drawn = torch.empty(groups, self.model.hidden_size)
        drawn.normal_(0.0, std, generator=seed.stream("upcycled router", options.seed, layer))
        return drawn.repeat_interleave(options.granularity, dim=0)

    def _gate_up(self, layer: int, experts: range) -> "Iterator[Tensor]":
        """[2W, D] each."""
        import torch

        gate_ID, up_ID = self._dense(layer, "gate"), self._dense(layer, "up")
        for expert in experts:
            columns = self._columns(expert)
            piece = torch.cat([gate_ID[columns], up_ID[columns]])
            for matrix, part_WD in zip(("gate", "up"), piece.chunk(2), strict=True):
                self._vary(part_WD, layer, matrix, expert)
            yield piece
            del piece, part_WD  # else they would be held while the next is made

    def _down(self, layer: int, experts: range) -> "Iterator[Tensor]":
        """[D, W] each."""
        assert self.model.moe is not None
        down_DI = self._dense(layer, "down")
        scale = self.options.granularity / self.model.moe.route_scale
        for expert in experts:
            piece = down_DI[:, self._columns(expert)] * scale
            self._vary(piece.T, layer, "down", expert)
            yield piece
            del piece

    def _shared(self, layer: int, matrix: str) -> "Tensor":
        """The first S columns: [S, D] of gate and up, [D, S] of down."""
        assert self.model.moe is not None
        columns = slice(0, self.options.shared_expert_size)
        whole = self._dense(layer, matrix)
        if matrix != "down":
            return whole[columns].clone()
        return whole[:, columns] * (2.0 if self.model.moe.shared_expert_gate else 1.0)

    def _dense(self, layer: int, matrix: str) -> "Tensor":
        (whole,) = self.dense.pieces(f"layers.{layer}.ffn.{matrix}.weight")
        return whole

    def _columns(self, expert: int) -> slice:
        """The expert's, among those of the dense block."""
        width = self.options.shard_size(self.dense.model)
        start = (self.options.shared_expert_size or 0) + expert % self.options.granularity * width
        return slice(start, start + width)

    def _vary(self, part_WD: "Tensor", layer: int, matrix: str, expert: int) -> None:
        """Noise and new columns, in place.

        New ones are normal with mean and deviation of those they replace (arXiv:2502.19261, section 3); gate, up and
        down of an expert lose the same.
        """
        import torch

        options = self.options
        if not (options.noise or options.drop):
            return
        draws = seed.stream("upcycled experts", options.seed, layer, matrix, expert)
        chooses = seed.stream("upcycled columns", options.seed, layer, expert)
        chosen = torch.randperm(len(part_WD), generator=chooses)[: options.dropped_columns(self.dense.model)]
        old = part_WD[chosen]
        if options.noise:
            std = float(part_WD.std(correction=0)) * options.noise
            part_WD += torch.empty(part_WD.shape).normal_(0.0, std, generator=draws)
        if options.drop:
            mean, std = float(old.mean()), float(old.std(correction=0))
            part_WD[chosen] = old.normal_(mean, std, generator=draws)

    def _zeros(self, *shape: int) -> "Tensor":
        import torch

        return torch.zeros(shape)
