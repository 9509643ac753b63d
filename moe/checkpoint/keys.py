"""The key of a tensor -> what it is of, and which rank writes it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Key:
    """`STATE/PARAMETER`, or `STATE/PARAMETER[EXPERT]` for one expert of a stacked parameter."""

    state: str
    parameter: str
    expert: int | None

    @classmethod
    def parse(cls, text: str) -> "Key":
        """A key without a slash is a state of no parameter."""
        match = re.fullmatch(r"([^/]*)(?:/(.*?)(?:\[(\d+)\])?)?", text)
        assert match is not None
        return cls(match[1], match[2] or "", int(match[3]) if match[3] else None)


def writer(key: Key, parameters: Sequence[str], num_experts: int, world_size: int, ep: int) -> int:
    """The rank that has a tensor in its part, as `moe.checkpoint.state.collect` deals them out.

    `parameters`: names in the order of the model. Of the ranks that hold an expert the first writes it; whole
    parameters go round; buffers and the rest are the first rank's.
    """
    if key.expert is not None:
        return key.expert // (num_experts // ep)
    if key.parameter in parameters:
        return parameters.index(key.parameter) % world_size
    return 0
