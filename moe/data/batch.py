"""Rows of tokens -> batches, as the model takes them.

Suffixes: B sequences of a micro-batch, S positions of a row, P of them here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

IGNORED = -100
"""The label of a position that predicts nothing, as in `transformers`."""


class Row(NamedTuple):
    """A sample."""

    ids_S: npt.NDArray[np.int64]
    labels_S: npt.NDArray[np.int64]
    """The next tokens; `IGNORED` where none is predicted."""
    filled: int
    """Positions from the beginning that are more than padding."""
    lengths: Sequence[int] | None = None
    """Of the documents it is made of, in tokens, where attention stays inside them; None: it is one."""

    @classmethod
    def blank(cls, length: int, pad_id: int) -> "Row":
        """Nothing but padding."""
        ids_S = np.full(length, pad_id, dtype=np.int64)
        return cls(ids_S, ids_S, 0)

    @property
    def documents_S(self) -> npt.NDArray[np.int32] | None:  # noqa: N802  its shape
        """Which document of the row each token belongs to, from 0 on; padding is one of its own."""
        return None if self.lengths is None else _documents([self.lengths], len(self.ids_S))[0]

    @property
    def num_predictions(self) -> int:
        """Positions whose prediction counts."""
        return int((self.labels_S[: self.filled] >= 0).sum())

    def first(self, predictions: int) -> "Row":
        """Only so many predictions from the beginning, and what comes before them."""
        counted_N = np.cumsum(self.labels_S[: self.filled] >= 0)
        filled = int(np.searchsorted(counted_N, predictions)) + 1 if predictions else 0
        return self._replace(filled=min(filled, self.filled))


@dataclass(frozen=True)
class Block:
    """Samples side by side: of each what `Row` says."""

    ids_BS: npt.NDArray[np.int64]
    labels_BS: npt.NDArray[np.int64]
    filled_B: Sequence[int]
    lengths_B: Sequence[Sequence[int] | None]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Block":
        ids_BS, labels_BS = _stacked([row.ids_S for row in rows]), _stacked([row.labels_S for row in rows])
        return cls(ids_BS, labels_BS, [row.filled for row in rows], [row.lengths for row in rows])

    def __getitem__(self, at: int) -> Row:
        return Row(self.ids_BS[at], self.labels_BS[at], self.filled_B[at], self.lengths_B[at])


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, what comes after each of them, and which of them are more than padding."""

    input_ids_BS: torch.Tensor  # int64
    labels_BS: torch.Tensor
    """int64; `IGNORED` where the next token is not predicted."""
    mask_BS: torch.Tensor
    """bool: False for padding, which counts nowhere. Whatever is not padding is routed and balanced."""
    documents_BS: torch.Tensor | None = None
    """int32, on the CPU: which document of its row each token belongs to; all positions of the rows, wherever the
    batch's own are. None: attention sees the whole row."""

    @classmethod
    def of(cls, rows: Block | Sequence[Row]) -> "Batch":
        block = rows if isinstance(rows, Block) else Block.of(rows)
        length = block.ids_BS.shape[1]
        mask_BS = np.arange(length) < np.array(block.filled_B)[:, None]
        documents_BS = None
        if any(lengths is not None for lengths in block.lengths_B):
            documents_BS = torch.from_numpy(_documents(block.lengths_B, length))
        ids_BS, labels_BS = torch.from_numpy(block.ids_BS), torch.from_numpy(block.labels_BS)
        return cls(ids_BS, labels_BS, torch.from_numpy(mask_BS), documents_BS)

    def predicted(self) -> torch.Tensor:
        """Bool [B, S]: positions whose prediction counts in the loss."""
        return self.mask_BS & (self.labels_BS >= 0)

    @property
    def num_predictions(self) -> int:
        """Positions whose prediction counts."""
        return int(self.predicted().sum())

    def part(self, positions: slice) -> "Batch":
        """Some positions of every row; a label goes with its token, so nothing is lost between parts."""
        return self._mapped(lambda tensor: tensor[:, positions].contiguous())

    def on(self, device: torch.device) -> "Batch":
        """The same there; documents stay, since attention is planned with them on the host."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def inputs(self, jitter: Any = None) -> tuple[Any, ...]:
        """As `moe.model.Transformer` takes them."""
        return self.input_ids_BS, self.labels_BS, self.mask_BS, jitter, self.documents_BS

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        ids_BS, labels_BS, mask_BS = map(change, (self.input_ids_BS, self.labels_BS, self.mask_BS))
        return Batch(ids_BS, labels_BS, mask_BS, self.documents_BS)


def _stacked(rows_BS: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    stacked_BS = np.empty((len(rows_BS), len(rows_BS[0])), dtype=np.int64)
    for row_S, place_S in zip(rows_BS, stacked_BS, strict=True):
        # Not by memcpy, which is ten times as slow on Zen 3 if addresses meet badly.
        np.positive(row_S, out=place_S)
    return stacked_BS


def _documents(lengths_B: Sequence[Sequence[int] | None], length: int) -> npt.NDArray[np.int32]:
    """[B, S]; a row of one document is 0 throughout."""
    sizes: list[int] = []
    numbers: list[int] = []
    for lengths in lengths_B:
        here = (length,) if lengths is None else lengths
        sizes += [*here, length - sum(here)]
        numbers += range(len(here) + 1)
    return np.repeat(np.array(numbers, dtype=np.int32), sizes).reshape(len(lengths_B), length)
