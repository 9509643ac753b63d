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
        return None if self.lengths is None else _documents([self])[0]

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
    def of(cls, rows: Sequence[Row]) -> "Batch":
        ids_BS = torch.from_numpy(np.stack([row.ids_S for row in rows]))
        labels_BS = torch.from_numpy(np.stack([row.labels_S for row in rows]))
        filled_B1 = np.array([[row.filled] for row in rows])
        mask_BS = torch.from_numpy(np.arange(ids_BS.shape[1]) < filled_B1)
        if all(row.lengths is None for row in rows):
            return cls(ids_BS, labels_BS, mask_BS)
        return cls(ids_BS, labels_BS, mask_BS, torch.from_numpy(_documents(rows)))

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


def _documents(rows: Sequence[Row]) -> npt.NDArray[np.int32]:
    """[B, S]; a row of one document is 0 throughout."""
    length = len(rows[0].ids_S)
    sizes: list[int] = []
    numbers: list[int] = []
    for row in rows:
        here = (length,) if row.lengths is None else row.lengths
        sizes += [*here, length - sum(here)]
        numbers += range(len(here) + 1)
    return np.repeat(np.array(numbers, dtype=np.int32), sizes).reshape(len(rows), length)
