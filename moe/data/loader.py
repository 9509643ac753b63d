"""Rows of tokens -> batches, in an order that is a function of the seed and the step alone.

Sample j of step s is number s G + j, G = global_batch_size, of an endless line; rank r of W takes j in
[r G / W, (r + 1) G / W). Of one folder that line is epochs, each a permutation of all its rows; of a mixture, each
source has such epochs, and the mixture says whose turn it is. Hence neither the number of ranks nor the size of
micro-batches changes what a step sees, and a run goes on at any step at once: the step is all the state there is. Ranks
that share sequences are one such r together; each takes its own positions of the same rows.

Suffixes: B sequences of a micro-batch, S tokens of a sequence.
"""

import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol, TypeVar

import xxhash

from moe.data.batch import IGNORED, Batch, Block, Row
from moe.data.mixture import Mixture
from moe.data.rows import FirstRows, PackedRows, Packing, Rows, TokenSource, open_rows
from moe.errors import DataError

__all__ = ["IGNORED", "WHOLE", "Batch", "train_batches", "validation_batches"]

WHOLE = slice(None)
_PREFETCHED_STEPS = 2


def train_batches(
    data: TokenSource | Sequence[TokenSource],
    *,
    sequence_length: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    start_step: int,
    positions: slice = WHOLE,
    packing: Packing = "concatenate",
    attend_across_documents: bool = True,
    mixture: Mixture | None = None,
) -> Iterator[tuple[Batch, ...]]:
    """For each optimizer step from `start_step` on, without end, the micro-batches of `rank`, `positions` of them.

    A step has global_batch_size / world_size / micro_batch_size of them. `data` are the sources of a `mixture`, or one
    without. The next steps are read in the background; closing the iterator ends that. Raises `DataError` if a
    source's training split is shorter than one sequence and its next token.
    """
    if global_batch_size % (world_size * micro_batch_size):
        raise ValueError(f"{global_batch_size} sequences for {world_size} ranks x {micro_batch_size}")
    sources = list(data) if isinstance(data, Sequence) else [data]
    orders = []
    for number, source in enumerate(sources):
        rows = training_rows(source, sequence_length, packing, apart=not attend_across_documents, seed=seed)
        orders.append(_Shuffled(rows, _shuffle_seed(seed, number)))
    steps = _Steps(orders, mixture, rank, world_size, global_batch_size, micro_batch_size, positions)
    return _prefetched(steps, start_step)


def training_rows(data: TokenSource, length: int, packing: Packing, *, apart: bool, seed: int) -> Rows:
    """The rows of an epoch. Raises `DataError` if there is less than one."""
    if not data.is_chat and data.num_tokens("train") <= length:
        raise DataError(
            f"{data.folder}: the training split has {data.num_tokens('train')} tokens: a sequence of "
            f"{length} needs {length + 1}. Use shorter sequences, or prepare more text."
        )
    rows = open_rows(data, "train", length, packing, apart=apart, seed=seed)
    if not len(rows):
        raise DataError(
            f"{data.folder}: the training split is empty. Prepare more, or leave this source out."
        )
    return rows


def validation_batches(
    data: TokenSource,
    *,
    sequence_length: int,
    batch_size: int,
    rank: int,
    world_size: int,
    positions: slice = WHOLE,
    max_tokens: int | None = None,
    packing: Packing = "concatenate",
    attend_across_documents: bool = True,
) -> Iterator[Batch]:
    """The share of `rank` in the validation split: over all ranks, each predicted token counts once.

    The last row is filled with pad tokens that do not count. Every rank gets the same number of batches, some
    of them without a position that counts. `positions` are those of each row that are wanted; `max_tokens` keeps
    only so many predictions from the beginning.
    """
    rows = open_rows(data, "validation", sequence_length, packing, apart=not attend_across_documents, seed=0)
    if max_tokens is not None:
        rows = FirstRows(rows, max_tokens)
    blank = Row.blank(sequence_length, data.pad_id)
    return _prefetched(_ValidationBatches(rows, blank, batch_size, rank, world_size, positions), 0)


class _Shuffled:
    """Epochs of rows, each in an order of its own, without end. Grain shuffles numbers: rows would cost it more."""

    def __init__(self, rows: Rows, seed: int) -> None:
        self._rows = rows
        self._order = _grain().MapDataset.range(len(rows)).shuffle(seed=seed).repeat()

    def __getitem__(self, number: int) -> Row:
        return self._rows[self._order[number]]

    def block(self, numbers: Sequence[int]) -> Block | list[Row]:
        indices = [self._order[number] for number in numbers]
        if isinstance(self._rows, PackedRows):
            return self._rows.block(indices)
        return [self._rows[index] for index in indices]


class _Steps:
    """Step -> this rank's micro-batches."""

    def __init__(
        self,
        orders: Sequence[_Shuffled],
        mixture: Mixture | None,
        rank: int,
        world_size: int,
        global_batch_size: int,
        micro_batch_size: int,
        positions: slice,
    ) -> None:
        self._orders, self._mixture, self._rank, self._positions = orders, mixture, rank, positions
        self._global, self._micro = global_batch_size, micro_batch_size
        self._local = global_batch_size // world_size

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> tuple[Batch, ...]:
        first = step * self._global + self._rank * self._local
        if self._mixture is None:
            places = [(0, number) for number in range(first, first + self._local)]
        else:
            places = self._mixture.stretch(first, self._local)
        starts = range(0, self._local, self._micro)
        return tuple(self._batch(places[at : at + self._micro]).part(self._positions) for at in starts)

    def _batch(self, places: Sequence[tuple[int, int]]) -> Batch:
        if len({source for source, _ in places}) == 1:
            return Batch.of(self._orders[places[0][0]].block([number for _, number in places]))
        return Batch.of([self._orders[source][number] for source, number in places])


class _ValidationBatches:
    """Number of a pass over all ranks -> this rank's batch in it."""

    def __init__(
        self, rows: Rows, blank: Row, batch_size: int, rank: int, world_size: int, positions: slice
    ) -> None:
        self._rows, self._blank, self._size, self._positions = rows, blank, batch_size, positions
        self._rank, self._world = rank, world_size

    def __len__(self) -> int:
        return -(-len(self._rows) // (self._size * self._world))

    def __getitem__(self, index: int) -> Batch:
        first = (index * self._world + self._rank) * self._size
        numbers = range(first, first + self._size)
        rows = [self._rows[number] if number < len(self._rows) else self._blank for number in numbers]
        return Batch.of(rows).part(self._positions)


T_co = TypeVar("T_co", covariant=True)


class _Source(Protocol[T_co]):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> T_co: ...


def _prefetched(source: _Source[T_co], start: int) -> Iterator[T_co]:
    """Elements of `source` from `start` on, read ahead by a thread that lives as long as the iterator."""
    grain = _grain()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_STEPS)
    elements: Any = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    elements.set_state({"next_index": start})
    return _until_closed(elements)


def _until_closed(elements: Any) -> Iterator[Any]:
    try:
        yield from elements
    finally:
        elements.close()


def _shuffle_seed(seed: int, source: int) -> int:
    # Grain shuffles epoch e with seed + e: hashing keeps seed 1 from being seed 0 one epoch later.
    return xxhash.xxh32_intdigest(f"shuffle {seed}{f' {source}' if source else ''}".encode())


def _grain() -> ModuleType:
    """Grain, imported when first needed and without its warning that JAX is not installed."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        return importlib.import_module("grain")
    finally:
        absl.setLevel(level)
