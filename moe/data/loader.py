"""Token shards -> batches, in an order that is a function of the seed and the step alone.

The split's documents lie end to end; sample i is tokens [i S, (i + 1) S] of them, S = sequence_length and one
more to predict. Sample j of step s is number s G + j, G = global_batch_size, of an endless row of epochs, each a
permutation of all samples; rank r of W takes j in [r G / W, (r + 1) G / W). Hence neither the number of ranks
nor the size of micro-batches changes what a step sees, and a run goes on at any step at once. Ranks that share
sequences are one such r together; each takes its own positions of the same rows.

Of conversations each is a sample, however short: it is never cut, and what is left of its row is padding. What others
than the assistant wrote is seen, by the experts too, but not predicted. (A row has one conversation because attention
would see from one into the other.)

Suffixes: B sequences of a micro-batch, S tokens of a sequence, N tokens.
"""

import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import xxhash

from moe.data.conversations import Conversations
from moe.data.shards import TokenData
from moe.errors import DataError

WHOLE = slice(None)
IGNORED = -100
"""The label of a position that predicts nothing, as in `transformers`."""
_PREFETCHED_STEPS = 2


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, what comes after each of them, and which of them are more than padding."""

    input_ids_BS: torch.Tensor  # int64
    labels_BS: torch.Tensor
    """int64; `IGNORED` where the next token is not predicted."""
    mask_BS: torch.Tensor
    """bool: False for padding, which counts nowhere. Whatever is not padding is routed and balanced."""

    def predicted(self) -> torch.Tensor:
        """Bool [B, S]: positions whose prediction counts in the loss."""
        return self.mask_BS & (self.labels_BS >= 0)

    @property
    def num_predictions(self) -> int:
        """Positions whose prediction counts."""
        return int(self.predicted().sum())

    def part(self, positions: slice) -> "Batch":
        """Some positions of every row; a label goes with its token, so nothing is lost between parts."""
        return Batch(*(tensor[:, positions].contiguous() for tensor in vars(self).values()))


def train_batches(
    data: TokenData,
    *,
    sequence_length: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    start_step: int,
    positions: slice = WHOLE,
) -> Iterator[tuple[Batch, ...]]:
    """For each optimizer step from `start_step` on, without end, the micro-batches of `rank`, `positions` of them.

    A step has global_batch_size / world_size / micro_batch_size of them, every position counting. The next steps
    are read in the background; closing the iterator ends that. Raises `DataError` if the training split is
    shorter than one sequence and its next token.
    """
    if global_batch_size % (world_size * micro_batch_size):
        raise ValueError(f"{global_batch_size} sequences for {world_size} ranks x {micro_batch_size}")
    samples = _samples(data, "train", sequence_length)
    if not len(samples):
        raise DataError(
            f"{data.folder}: the training split has {data.num_tokens('train')} tokens: a sequence of "
            f"{sequence_length} needs {sequence_length + 1}. Use shorter sequences, or prepare more text."
        )
    order = _grain().MapDataset.source(samples).shuffle(seed=_shuffle_seed(seed)).repeat()
    steps = _Steps(order, rank, world_size, global_batch_size, micro_batch_size, positions)
    return _prefetched(steps, start_step)


def validation_batches(
    data: TokenData,
    *,
    sequence_length: int,
    batch_size: int,
    rank: int,
    world_size: int,
    positions: slice = WHOLE,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """The share of `rank` in the validation split: over all ranks, each predicted token counts once.

    The last row is filled with pad tokens that do not count. Every rank gets the same number of batches, some
    of them without a position that counts. `positions` are those of each row that are wanted; `max_tokens` keeps
    only so many predictions from the beginning.
    """
    samples = _samples(data, "validation", sequence_length, tail=True, max_predictions=max_tokens)
    return _prefetched(_ValidationBatches(samples, batch_size, rank, world_size, positions), 0)


class _Row(NamedTuple):
    """A sample."""

    ids_N: np.typing.NDArray[np.int64]
    """[S + 1]."""
    filled: int
    """Positions from the beginning that are more than padding and have a next token."""
    predicted_S: np.typing.NDArray[np.bool_] | None = None
    """Which next tokens are predicted; None: all that are there."""


def _samples(
    data: TokenData, split: str, length: int, *, tail: bool = False, max_predictions: int | None = None
) -> "_Samples | _ConversationSamples":
    if data.is_chat:
        return _ConversationSamples(data, split, length, max_predictions)
    return _Samples(data, split, length, tail=tail, max_predictions=max_predictions)


class _ConversationSamples:
    """Conversation i of a split, padded. Raises `DataError` if the longest does not fit."""

    def __init__(
        self, data: TokenData, split: str, sequence_length: int, max_predictions: int | None
    ) -> None:
        self.sequence_length, self.pad_id = sequence_length, data.pad_id
        self._conversations = Conversations(data, split)
        if (longest := self._conversations.longest) > sequence_length + 1:
            raise DataError(
                f"{data.folder}: the longest conversation has {longest} tokens, and none is cut: a sequence of "
                f"{sequence_length} and its next token hold {sequence_length + 1}. Use longer sequences, or prepare "
                f"with a max_tokens of the chat source."
            )
        self._before = None if max_predictions is None else self._conversations.predicted_before()
        self._left = max_predictions or 0
        self._count = len(self._conversations)
        if self._before is not None:
            self._count = int((self._before[:-1] < self._left).sum())

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> _Row:
        ids_N = np.full(self.sequence_length + 1, self.pad_id, dtype=np.int64)
        predicted_S = np.zeros(self.sequence_length, dtype=np.bool_)
        if index >= self._count:
            return _Row(ids_N, 0, predicted_S)
        ids, written = self._conversations[index]
        ids_N[: len(ids)] = ids
        predicted_S[: len(ids) - 1] = written[1:]
        if self._before is not None:
            predicted_S &= np.cumsum(predicted_S) <= self._left - self._before[index]
        return _Row(ids_N, len(ids) - 1, predicted_S)


class _Samples:
    """Sample i of a split; with `tail`, a last short one."""

    def __init__(
        self,
        data: TokenData,
        split: str,
        sequence_length: int,
        *,
        tail: bool = False,
        max_predictions: int | None = None,
    ) -> None:
        self.sequence_length = sequence_length
        self.pad_id = data.pad_id
        self._data, self._split = data, split
        self._predictions = max(data.num_tokens(split) - 1, 0)
        if max_predictions is not None:
            self._predictions = min(self._predictions, max_predictions)
        self._count = (
            -(-self._predictions // sequence_length) if tail else self._predictions // sequence_length
        )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> _Row:
        start = index * self.sequence_length
        counted = max(min(self.sequence_length, self._predictions - start), 0)
        ids_N = np.full(self.sequence_length + 1, self.pad_id, dtype=np.int64)
        if counted:
            ids_N[: counted + 1] = self._data.tokens(self._split, start, start + counted + 1)
        return _Row(ids_N, counted)


class _Steps:
    """Step -> this rank's micro-batches."""

    def __init__(
        self,
        order: Sequence[_Row],
        rank: int,
        world_size: int,
        global_batch_size: int,
        micro_batch_size: int,
        positions: slice,
    ) -> None:
        self._order, self._rank, self._positions = order, rank, positions
        self._global, self._micro = global_batch_size, micro_batch_size
        self._local = global_batch_size // world_size

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> tuple[Batch, ...]:
        first = step * self._global + self._rank * self._local
        starts = range(first, first + self._local, self._micro)
        rows = ([self._order[i] for i in range(at, at + self._micro)] for at in starts)
        return tuple(_batch(here).part(self._positions) for here in rows)


class _ValidationBatches:
    """Number of a pass over all ranks -> this rank's batch in it."""

    def __init__(
        self,
        samples: _Samples | _ConversationSamples,
        batch_size: int,
        rank: int,
        world_size: int,
        positions: slice,
    ) -> None:
        self._samples, self._size, self._positions = samples, batch_size, positions
        self._rank, self._world = rank, world_size

    def __len__(self) -> int:
        return -(-len(self._samples) // (self._size * self._world))

    def __getitem__(self, index: int) -> Batch:
        first = (index * self._world + self._rank) * self._size
        return _batch([self._samples[i] for i in range(first, first + self._size)]).part(self._positions)


def _batch(rows: list[_Row]) -> Batch:
    ids_BN = torch.from_numpy(np.stack([row.ids_N for row in rows]))
    mask_BS = torch.arange(ids_BN.shape[1] - 1)[None, :] < torch.tensor([[row.filled] for row in rows])
    labels_BS = ids_BN[:, 1:].contiguous()
    predicted = [row.predicted_S for row in rows if row.predicted_S is not None]
    if predicted:
        labels_BS[~torch.from_numpy(np.stack(predicted))] = IGNORED
    return Batch(ids_BN[:, :-1].contiguous(), labels_BS, mask_BS)


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


def _shuffle_seed(seed: int) -> int:
    # Grain shuffles epoch e with seed + e: hashing keeps seed 1 from being seed 0 one epoch later.
    return xxhash.xxh32_intdigest(f"shuffle {seed}".encode())


def _grain() -> ModuleType:
    """Grain, imported when first needed and without its warning that JAX is not installed."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        return importlib.import_module("grain")
    finally:
        absl.setLevel(level)
