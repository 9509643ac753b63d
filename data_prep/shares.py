"""Texts -> the split each falls to, and their tokens into the shards of their splits."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from data_prep.encoder import Encoder
from data_prep.recipe import ValidationSplit
from data_prep.splits import SplitWriter
from moe.data.shards import Split

_HASHES = 2**64


def split_of(text: bytes, validation: ValidationSplit) -> Split:
    """By the document's own text, so that order and neighbours are nothing and copies never straddle."""
    place = xxhash.xxh3_64_intdigest(b"%d\0%b" % (validation.seed, text))
    return "validation" if place < validation.fraction * _HASHES else "train"


def encode(
    texts: Sequence[bytes],
    encoder: Encoder,
    writers: Mapping[Split, SplitWriter],
    validation: ValidationSplit,
) -> int:
    """Write the documents in their order; the number of their tokens."""
    found = encoder.encode(texts)
    if not validation.fraction:
        writers["train"].add_many(found.ids_N, found.lengths_D, sum(map(len, texts)))
        return len(found.ids_N)
    is_held_out_D = np.fromiter(
        (split_of(text, validation) == "validation" for text in texts), bool, len(texts)
    )
    sizes_D = np.fromiter(map(len, texts), np.int64, len(texts))
    is_held_out_N = np.repeat(is_held_out_D, found.lengths_D)
    choices: list[tuple[Split, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]] = [
        ("validation", is_held_out_D, is_held_out_N),
        ("train", ~is_held_out_D, ~is_held_out_N),
    ]
    for split, is_ours_D, is_ours_N in choices:
        if is_ours_D.any():
            writers[split].add_many(
                found.ids_N[is_ours_N], found.lengths_D[is_ours_D], int(sizes_D[is_ours_D].sum())
            )
    return len(found.ids_N)
