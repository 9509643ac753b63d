"""Chat shards -> conversations, one by one: ids, and which of them the assistant wrote. N tokens."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe.data.indexed import Tokens
from moe.data.masks import Mask, mask_path, open_mask
from moe.data.shards import TokenData


class Conversations:
    """The conversations of a split, in the order of its shards."""

    def __init__(self, data: TokenData, split: str) -> None:
        self._data, self.split = data, split

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[tuple[Tokens, Mask]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tokens, Mask]:
        """Ids [N], and uint8 [N]: 1 for what the assistant wrote."""
        start, end = int(self._starts[index]), int(self._ends[index])
        return self._data.tokens(self.split, start, end), self._masks[start:end]

    @property
    def longest(self) -> int:
        """Tokens of the longest; 0 if there are none."""
        return int((self._ends - self._starts).max(initial=0))

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self._data.document_lengths(self.split), dtype=np.int64)

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.zeros(1, dtype=np.int64), self._ends])[:-1]

    @cached_property
    def _masks(self) -> Mask:
        masks = [open_mask(mask_path(prefix)) for prefix in self._shards]
        if len(masks) == 1:
            return masks[0]
        return np.concatenate([np.zeros(0, dtype=np.uint8), *masks])

    @property
    def _shards(self) -> list[Path]:
        facts = [facts for name, facts in self._data.manifest.splits.items() if name == self.split]
        return [self._data.folder / shard.name for fact in facts for shard in fact.shards]
