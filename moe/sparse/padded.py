"""The rows of each expert -> as many as one of few sizes: oneDNN makes a kernel for each.

R rows at their experts, P rows with those that fill up, e experts held here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.sparse.copies import Copies
from moe.sparse.product import Products

_SIZES = 32
"""Between a power of two and the next, from 256 on: at most 1 row in 32 fills up, on average 1 in 64."""
_LEAST = 8
"""Rows: products of multiples of it are the fastest."""


@dataclass(frozen=True)
class Padded:
    """An expert's last row fills up with weight 0: it adds nothing to any sum, nor to a weight's gradient.

    oneDNN makes a kernel for every size that it has not seen lately, which takes longer than the product itself;
    counts of a router are others at every step.
    """

    rows_per_bucket: list[int]
    source_of_row_P: Tensor
    """int64: the source that each row copies."""
    row_P: Tensor | None
    """int64: which of the R rows it is; None: they are the same."""
    fills_P: Tensor | None
    """bool: whether it only fills up."""

    @classmethod
    def of(cls, copies: Copies, products: Products) -> "Padded":
        """For products on CPU that have a kernel for each size; for others, the rows that there are."""
        if not products.kernel_per_size or copies.counts.device.type != "cpu":
            return cls(copies.rows_per_bucket, copies.source_of_row_R.long().contiguous(), None, None)
        sizes = [size_for(count) for count in copies.rows_per_bucket]
        sizes_e, counts_e = torch.tensor(sizes), copies.counts
        # In each expert: 0, 1, ... and on to the size
        begins_e, padded_begins_e = counts_e.cumsum(0) - counts_e, sizes_e.cumsum(0) - sizes_e
        number_P = torch.arange(sum(sizes)) - padded_begins_e.repeat_interleave(sizes_e)
        last_P = (counts_e - 1).repeat_interleave(sizes_e)
        row_P = begins_e.repeat_interleave(sizes_e) + torch.minimum(number_P, last_P)
        return cls(sizes, copies.source_of_row_R.long()[row_P], row_P, number_P > last_P)

    def check(self, num_sources: int) -> None:
        """Raises `IndexError` if a row is the copy of a source that is not there: compiled code does not look."""
        source_P = self.source_of_row_P
        if source_P.device.type != "cpu" or not source_P.numel():
            return
        least, most = int(source_P.min()), int(source_P.max())
        if least < 0 or most >= num_sources:
            raise IndexError(f"rows copy sources {least} to {most} of {num_sources}")

    def spread(self, weights_R: Tensor) -> Tensor:
        """[R] -> [P], with 0 for what fills up."""
        if self.row_P is None or self.fills_P is None:
            return weights_R
        return weights_R[self.row_P].masked_fill_(self.fills_P, 0)

    def gather(self, values_P: Tensor) -> Tensor:
        """[P] -> [R]."""
        return values_P if self.fills_P is None else values_P[~self.fills_P]


def size_for(count: int) -> int:
    """The next of the sizes: 8, 16, ..., 256, then 32 up to each power of two."""
    step = max(_LEAST, (1 << (count - 1).bit_length()) // 2 // _SIZES) if count else _LEAST
    return -(-count // step) * step
