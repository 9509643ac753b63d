"""The documents of a split -> rows of a length: end to end, or packed so that none is cut that would fit.

Where attention stays inside documents (`apart`), every token stands in one row once, and predicts what follows it in
its document: nothing at its end. Else a row's last label is the token that the next row begins with.

Of conversations none is cut. A row has one, and what is left of it is padding; or, packed, as many as fit, and then
attention has to stay inside. What others than the assistant wrote is seen, by the experts too, but not predicted.

S positions of a row.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from moe.data.batch import IGNORED, Block, Row
from moe.data.conversations import Conversations
from moe.data.index import open_pieces
from moe.data.indexed import Tokens
from moe.data.masks import Mask
from moe.data.packing import Pieces
from moe.data.shards import TokenData
from moe.errors import DataError

Packing = Literal["concatenate", "best_fit"]


class TokenSource(Protocol):
    """Documents of tokens, end to end; see `TokenData`."""

    @property
    def folder(self) -> Path: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def is_chat(self) -> bool: ...
    @property
    def fingerprint(self) -> str: ...
    def num_tokens(self, split: str) -> int: ...
    def document_lengths(self, split: str) -> npt.NDArray[np.int64]: ...
    def tokens(self, split: str, start: int, stop: int) -> Tokens: ...
    def pieces(self, split: str, starts: Sequence[int], lengths: Sequence[int]) -> Tokens: ...


class Rows(Protocol):
    """Row i of a split."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Row: ...


def open_rows(
    data: TokenSource, split: str, length: int, packing: Packing, *, apart: bool, seed: int
) -> Rows:
    """Raises `DataError` if a conversation does not fit, or if packed ones would see one another."""
    if data.is_chat:
        assert isinstance(data, TokenData)
        return _conversations(data, split, length, packing, apart=apart, seed=seed)
    if packing == "best_fit":
        ends_D = np.cumsum(data.document_lengths(split), dtype=np.int64)
        pieces = open_pieces(data.folder, data.fingerprint, split, ends_D, length, seed)
        return PackedRows(data, split, length, pieces, ends_D, apart=apart)
    if apart:
        return ApartRows(data, split, length)
    return EndToEndRows(data, split, length)


class EndToEndRows:
    """Row i is tokens i S to (i + 1) S - 1 of all documents, and predicts the one after each; the last may be short."""

    def __init__(self, data: TokenSource, split: str, length: int) -> None:
        self._data, self._split, self._length = data, split, length
        self._predictions = max(data.num_tokens(split) - 1, 0)

    def __len__(self) -> int:
        return -(-self._predictions // self._length)

    def __getitem__(self, index: int) -> Row:
        start = index * self._length
        filled = min(self._length, self._predictions - start)
        ids_N = self._data.tokens(self._split, start, start + filled + 1).astype(np.int64)
        if filled < self._length:
            ids_N = np.append(ids_N, np.full(self._length - filled, self._data.pad_id))
        return Row(ids_N[:-1], ids_N[1:], filled)


class ApartRows:
    """The same rows of documents that do not see each other."""

    def __init__(self, data: TokenSource, split: str, length: int) -> None:
        self._data, self._split, self._length = data, split, length
        self._total = data.num_tokens(split)
        self._end_D = np.cumsum(data.document_lengths(split), dtype=np.int64)

    def __len__(self) -> int:
        return -(-self._total // self._length)

    def __getitem__(self, index: int) -> Row:
        start = index * self._length
        stop = min(start + self._length, self._total)
        tokens = self._data.tokens(self._split, start, min(stop + 1, self._total)).astype(np.int64)
        filled = stop - start
        first, last = np.searchsorted(self._end_D, (start, stop), side="right")
        last_N = np.unique(self._end_D[first:last]) - start - 1  # empty documents end where others do
        row = Row.blank(self._length, self._data.pad_id)
        labels_S = row.labels_S.copy()
        row.ids_S[:filled] = tokens[:filled]
        labels_S[: len(tokens) - 1] = tokens[1:]
        labels_S[last_N] = IGNORED
        bounds_N = np.append(last_N, filled - 1)  # the second of two equal ones is an empty document
        lengths = np.diff(bounds_N, prepend=-1).tolist()
        return Row(row.ids_S, labels_S, filled, lengths if lengths[-1] else lengths[:-1])


class PackedRows:
    """Rows of whole documents, and of pieces of those that are longer."""

    def __init__(
        self,
        data: TokenSource,
        split: str,
        length: int,
        pieces: Pieces,
        end_D: npt.NDArray[np.int64],
        *,
        apart: bool,
    ) -> None:
        self._data, self._split, self._length = data, split, length
        self._start_P, self._length_P, self._row_R1 = pieces.start_P, pieces.length_P, pieces.row_R1
        self._end_D, self._apart = end_D, apart

    def __len__(self) -> int:
        return len(self._row_R1) - 1

    def __getitem__(self, index: int) -> Row:
        return self.block([index])[0]

    def block(self, indices: Sequence[int]) -> Block:
        """Many at once, which costs each half as much."""
        size, starts_P, lengths_P, first_of = self._length, self._start_P, self._length_P, self._row_R1.item
        starts: list[int] = []
        lengths: list[int] = []
        lengths_B: list[list[int]] = []
        cut: list[int] = []  # places of last tokens that more of their document follows
        following: list[int] = []  # and of what follows
        for at, index in enumerate(indices, start=1):
            begin, end = first_of(index), first_of(index + 1)
            here = lengths_P[begin:end].tolist()
            starts += starts_P[begin:end].tolist()
            lengths += here
            lengths_B.append(here)
            if here[0] == size and not self._ends(starts[-1] + size):
                cut.append(at * size - 1)
                following.append(starts[-1] + size)
        found_N = self._data.pieces(self._split, starts + following, lengths + [1] * len(cut))
        filled_B = list(map(sum, lengths_B))
        ids_N, after = found_N[: sum(filled_B)], found_N[sum(filled_B) :]
        padded = ids_N.size < len(indices) * size
        if padded:
            ids_N = self._padded(ids_N, filled_B)
            lengths = [length for here in lengths_B for length in (*here, size - sum(here))]
        labels_N = np.empty(ids_N.size, dtype=np.int64)
        labels_N[:-1] = ids_N[1:]
        for end in accumulate(lengths) if self._apart else range(size, ids_N.size + 1, size):
            labels_N[end - 1] = IGNORED
        if cut:
            labels_N[cut] = after
        ids_BS = ids_N.astype(np.int64).reshape(-1, size)
        labels_BS = labels_N.reshape(-1, size)
        if padded:
            for filled, labels_S in zip(filled_B, labels_BS, strict=True):
                labels_S[filled - 1 if filled < size else size :] = IGNORED
        return Block(ids_BS, labels_BS, filled_B, lengths_B if self._apart else [None] * len(lengths_B))

    def _padded(self, ids_N: Tokens, filled_B: Sequence[int]) -> Tokens:
        """Rows of all positions from those that are filled. Shards of others may be too narrow for the pad token."""
        pad_id = self._data.pad_id
        dtype = np.promote_types(ids_N.dtype, np.min_scalar_type(pad_id))
        ids_BS = np.full((len(filled_B), self._length), pad_id, dtype=dtype)
        at = 0
        for filled, ids_S in zip(filled_B, ids_BS, strict=True):
            ids_S[:filled] = ids_N[at : at + filled]
            at += filled
        return ids_BS.reshape(-1)

    def _ends(self, token: int) -> bool:
        """Whether a document ends before `token`."""
        return bool(self._end_D[self._end_D.searchsorted(token)] == token)


def _conversations(
    data: TokenData, split: str, length: int, packing: Packing, *, apart: bool, seed: int
) -> "ConversationRows | PackedConversationRows":
    found = Conversations(data, split)
    if found.longest > length + 1:
        raise DataError(
            f"{data.folder}: the longest conversation has {found.longest} tokens, and none is cut: a sequence of "
            f"{length} and its next token hold {length + 1}. Use longer sequences, or prepare with a max_tokens of "
            f"the chat source."
        )
    if packing == "concatenate":
        return ConversationRows(data, found, length)
    if not apart:
        raise DataError(
            f"{data.folder}: data.packing is best_fit and data.attend_across_documents is true, but documents are "
            f"conversations, which must not see one another. Set data.attend_across_documents=false, or "
            f"data.packing=concatenate for one conversation a row."
        )
    # A conversation's last token is predicted, but predicts nothing: it needs no position.
    length_D = np.maximum(data.document_lengths(split) - 1, 0)
    pieces = open_pieces(data.folder, data.fingerprint, split, np.cumsum(length_D), length, seed)
    return PackedConversationRows(data, found, length, pieces)


class ConversationRows:
    """Conversation i, padded."""

    def __init__(self, data: TokenData, conversations: Conversations, length: int) -> None:
        self._conversations, self._length, self._pad_id = conversations, length, data.pad_id

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> Row:
        ids_N, written_N = self._conversations[index]
        row = Row.blank(self._length, self._pad_id)
        row.ids_S[: len(ids_N)] = ids_N[: self._length]
        labels_S = np.full(self._length, IGNORED, dtype=np.int64)
        labels_S[: len(ids_N) - 1] = _written(ids_N, written_N)
        return Row(row.ids_S, labels_S, len(ids_N) - 1)


class PackedConversationRows:
    """As many conversations as fit; piece k is a conversation of two tokens or more."""

    def __init__(self, data: TokenData, conversations: Conversations, length: int, pieces: Pieces) -> None:
        self._conversations, self._length, self._pad_id = conversations, length, data.pad_id
        self._pieces = pieces
        self._end_D = np.cumsum(np.maximum(data.document_lengths(conversations.split) - 1, 0))

    def __len__(self) -> int:
        return self._pieces.num_rows

    def __getitem__(self, index: int) -> Row:
        here = slice(int(self._pieces.row_R1[index]), int(self._pieces.row_R1[index + 1]))
        lengths, at = self._pieces.length_P[here].tolist(), 0
        row = Row.blank(self._length, self._pad_id)
        labels_S = np.full(self._length, IGNORED, dtype=np.int64)
        for which in np.searchsorted(self._end_D, self._pieces.start_P[here], side="right").tolist():
            ids_N, written_N = self._conversations[which]
            stop = at + len(ids_N) - 1
            row.ids_S[at:stop] = ids_N[:-1]
            labels_S[at:stop] = _written(ids_N, written_N)
            at = stop
        return Row(row.ids_S, labels_S, at, lengths)


class FirstRows:
    """The rows that hold so many predictions from the beginning."""

    def __init__(self, rows: Rows, predictions: int) -> None:
        self._rows, self._count, left = rows, 0, predictions
        while left > 0 and self._count < len(rows):
            self._last, left = left, left - rows[self._count].num_predictions
            self._count += 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        row = self._rows[index]
        return row if index < self._count - 1 else row.first(self._last)


def _written(ids_N: Tokens, written_N: Mask) -> npt.NDArray[np.int64]:
    """The labels of all but the last token: what the assistant wrote."""
    return np.where(written_N[1:] == 1, ids_N[1:].astype(np.int64), IGNORED)
