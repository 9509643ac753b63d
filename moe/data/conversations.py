"""Chat shards -> conversations, one by one: ids, and which of them the assistant wrote. N tokens."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe.data.indexed import Index, Tokens
from moe.data.masks import Mask, mask_path, open_mask
from moe.data.shards import TokenData


class Conversations:
    """The conversations of a split, in the order of its shards."""

    def __init__(self, data: TokenData, split: str) -> None:
        self._data, self._split = data, split

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[tuple[Tokens, Mask]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tokens, Mask]:
        """Ids [N], and uint8 [N]: 1 for what the assistant wrote."""
        start, end = int(self._starts[index]), int(self._ends[index])
        return self._data.tokens(self._split, start, end), self._masks[start:end]

    def predicted_before(self) -> npt.NDArray[np.int64]:
        """How many tokens the assistant wrote in all conversations before each, and after the last in all."""
        written = np.concatenate([[0], np.cumsum(self._masks, dtype=np.int64)])
        result: npt.NDArray[np.int64] = written[np.concatenate([[0], self._ends])]
        return result

    @property
    def longest(self) -> int:
        """Tokens of the longest; 0 if there are none."""
        return int((self._ends - self._starts).max(initial=0))

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        lengths = [
            np.asarray(Index.read(prefix.with_name(f"{prefix.name}.idx")).lengths_S)
            for prefix in self._shards
        ]
        return np.cumsum(np.concatenate([np.zeros(0, dtype=np.int32), *lengths]), dtype=np.int64)

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
        facts = [facts for name, facts in self._data.manifest.splits.items() if name == self._split]
        return [self._data.folder / shard.name for fact in facts for shard in fact.shards]
