"""Pieces of the matrices that partitions' edges cut -> those matrices, whole, at every rank that holds a piece.

P elements of a partition.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe.optim.share import Cut


def complete(
    values_P: Tensor, used: Sequence[Tensor], cuts: Sequence[Cut], ranks: dist.ProcessGroup
) -> list[tuple[Tensor, Tensor]]:
    """(the flattened matrix, whether any holder used it) for each of this partition's cuts.

    `used`: for each cut, a bool scalar that says whether this rank's piece counts. Collective over `ranks`, but
    nothing travels other than these pieces, to the ranks that hold another of the same matrix.
    """
    mine = dist.get_rank(ranks)
    packets = [
        torch.cat((values_P[cut.here], flag.view(1).to(values_P.dtype)))
        for cut, flag in zip(cuts, used, strict=True)
    ]
    shared = [
        [i for i, cut in enumerate(cuts) if other != mine and other in cut.pieces]
        for other in range(dist.get_world_size(ranks))
    ]
    lengths = [[_length(cuts[i].pieces[other]) + 1 for i in here] for other, here in enumerate(shared)]
    received = values_P.new_empty(sum(sum(here) for here in lengths))
    dist.all_to_all_single(
        received,
        torch.cat((values_P[:0], *(packets[i] for here in shared for i in here))),
        [sum(here) for here in lengths],
        [sum(packets[i].numel() for i in here) for here in shared],
        group=ranks,
    )
    arrived = iter(received.split([length for here in lengths for length in here]))
    wholes = [values_P.new_empty(cut.rows * cut.columns) for cut in cuts]
    counts = [packet[-1].clone() for packet in packets]
    for whole, cut, packet in zip(wholes, cuts, packets, strict=True):
        whole[cut.pieces[mine]] = packet[:-1]
    for other, here in enumerate(shared):
        for i in here:
            packet = next(arrived)
            wholes[i][cuts[i].pieces[other]] = packet[:-1]
            counts[i] += packet[-1]
    return [(whole, count > 0) for whole, count in zip(wholes, counts, strict=True)]


def _length(piece: slice) -> int:
    length: int = piece.stop - piece.start
    return length
