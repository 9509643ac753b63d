"""DeepSpeed's flat buffers -> where each parameter is kept, in float32, and which part of it on this rank.

Under ZeRO 1 and 2 the parameters of a group lie end to end in one buffer, cut into equal partitions, one for each
rank; the optimizer steps a float32 copy of this rank's. Under ZeRO 0 it steps the parameters themselves.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from moe.optim import Muon, Stack


@dataclass(frozen=True)
class Home:
    """Where the optimizer keeps a parameter."""

    tensor: Tensor
    """What it steps, and its state's key: the parameter itself, or this rank's partition, float32 [P]."""
    group: dict[str, Any]
    """The optimizer's parameter group."""
    offset: int
    """Where in the flattened `tensor` the parameter begins: before 0 or beyond P if other ranks hold its start."""
    numel: int
    """Elements of the whole parameter."""
    ranks: dist.ProcessGroup | None
    """The ranks that hold the partitions; None: there are none."""

    @property
    def inside(self) -> slice:
        """Which elements of the flattened parameter are here."""
        first = min(max(0, -self.offset), self.numel)
        return slice(first, max(first, min(self.numel, self.tensor.numel() - self.offset)))

    @property
    def here(self) -> slice:
        """Where they are in the flattened `tensor`."""
        inside = self.inside
        if inside.start == inside.stop:
            return slice(0, 0)
        return slice(inside.start + self.offset, inside.stop + self.offset)


def homes(optimizer: Any, zero_stage: int) -> dict[nn.Parameter, Home]:
    """The home of every trained parameter; `optimizer` is the DeepSpeed engine's."""
    if zero_stage == 0:
        return {
            parameter: Home(parameter, group, 0, parameter.numel(), None)
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
    found = {}
    for index, group in enumerate(optimizer.param_groups):
        flat = optimizer.bit16_groups_flat[index]
        partition = optimizer.single_partition_of_fp32_groups[index]
        ranks = optimizer.real_dp_process_group[index]
        start = dist.get_rank(ranks) * partition.numel()
        for parameter in optimizer.bit16_groups[index]:
            # Where memory says it is: DeepSpeed 0.19.8's own map is wrong under round_robin_gradients.
            assert parameter.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            offset = parameter.storage_offset() - flat.storage_offset()
            found[parameter] = Home(partition, group, offset - start, parameter.numel(), ranks)
    return found


def show_partitions(optimizer: Any, homes: dict[nn.Parameter, Home]) -> None:
    """Tell Muon, if that is what DeepSpeed steps, which matrices its flat partitions are made of."""
    base = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(base, Muon):
        return
    placed: dict[Tensor, list[tuple[int, Stack]]] = defaultdict(list)
    ranks: dict[Tensor, dist.ProcessGroup] = {}
    for parameter, home in homes.items():
        if home.ranks is not None and parameter in base.stacks:
            start = dist.get_rank(home.ranks) * home.tensor.numel()
            placed[home.tensor].append((start + home.offset, base.stacks[parameter]))
            ranks[home.tensor] = home.ranks
    for tensor, stacks in placed.items():
        base.partition(tensor, stacks, ranks[tensor])
