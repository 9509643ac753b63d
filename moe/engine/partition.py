"""DeepSpeed's partitions -> where each parameter is kept, in float32, and which part of it on this rank.

Under ZeRO 1 and 2 the parameters of a group lie end to end in one buffer, cut into equal partitions, one for each
rank; the optimizer steps a float32 copy of this rank's. Under ZeRO 3 every parameter is cut by itself, and this rank's
pieces lie end to end. Under ZeRO 0 the optimizer steps the parameters themselves.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.optim import FROZEN, Muon, Stack


@dataclass(frozen=True)
class Home:
    """Where the optimizer keeps a parameter."""

    tensor: Tensor
    """What it steps, and its state's key: the parameter itself, or this rank's partition, float32 [P]."""
    group: dict[str, Any]
    """The optimizer's parameter group."""
    shape: torch.Size
    """Of the whole parameter, which under ZeRO 3 is there only while it is used."""
    offset: int
    """Where in the flattened `tensor` the parameter begins: before 0 or beyond P if other ranks hold its start."""
    inside: slice
    """Which elements of the flattened parameter are here."""
    here: slice
    """Where they are in `tensor`."""
    ranks: dist.ProcessGroup | None = None
    """The ranks that hold the pieces; None: the whole is here."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return self.shape.numel()


def homes(optimizer: Any, zero_stage: int, model: nn.Module) -> dict[nn.Parameter, Home]:
    """The home of every parameter of `model`; `optimizer` is the DeepSpeed engine's.

    A frozen one is at home where the model computes with it, in the model's dtype, in the group `FROZEN`.
    """
    frozen = {p: _frozen(p) for p in model.parameters() if not p.requires_grad}
    match zero_stage:
        case 0:
            return frozen | _whole(optimizer)
        case 3:
            return frozen | _by_parameter(optimizer)
        case _:
            return frozen | _by_buffer(optimizer)


def show(parameter: nn.Parameter, value: Tensor, home: Home) -> None:
    """Put `value`, the whole, where the model computes with it, in the model's dtype.

    Under ZeRO 3 `publish` must follow, once for all parameters.
    """
    if hasattr(parameter, "ds_tensor"):
        piece = value.reshape(-1)[home.inside]
        parameter.ds_tensor.view(-1)[: piece.numel()] = piece.to(parameter.ds_tensor.device)
    else:
        parameter.copy_(value)


def publish(optimizer: Any) -> None:
    """Gather anew what every rank holds whole under ZeRO 3: small parameters. Collective; else nothing."""
    if kept := getattr(optimizer, "persistent_parameters", []):
        kept[0].partition(kept)
        kept[0].all_gather(kept)


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


def _frozen(parameter: nn.Parameter) -> Home:
    marked: Any = parameter  # by ZeRO 3
    if not hasattr(marked, "ds_tensor"):
        return _home(parameter, FROZEN, parameter.shape, 0, slice(0, parameter.numel()))
    ranks, piece = marked.ds_process_group, marked.ds_tensor
    first = dist.get_rank(ranks) * piece.ds_numel
    inside = _clip(first, first + piece.ds_numel, marked.ds_numel)
    return _home(piece, FROZEN, marked.ds_shape, -first, inside, ranks)


def _whole(optimizer: Any) -> dict[nn.Parameter, Home]:
    return {
        parameter: _home(parameter, group, parameter.shape, 0, slice(0, parameter.numel()))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _by_buffer(optimizer: Any) -> dict[nn.Parameter, Home]:
    found = {}
    for index, group in enumerate(optimizer.param_groups):
        flat = optimizer.bit16_groups_flat[index]
        partition = optimizer.single_partition_of_fp32_groups[index]
        ranks = optimizer.real_dp_process_group[index]
        start = dist.get_rank(ranks) * partition.numel()
        for parameter in optimizer.bit16_groups[index]:
            # Where memory says it is: DeepSpeed 0.19.8's own map is wrong under round_robin_gradients.
            assert parameter.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            offset = parameter.storage_offset() - flat.storage_offset() - start
            inside = _clip(-offset, partition.numel() - offset, parameter.numel())
            found[parameter] = _home(partition, group, parameter.shape, offset, inside, ranks)
    return found


def _by_parameter(optimizer: Any) -> dict[nn.Parameter, Home]:
    found = {}
    for index, parameters in enumerate(optimizer.fp16_groups):
        group = optimizer.param_groups[optimizer.sub_group_to_group_id[index]]
        partition = optimizer.fp32_partitioned_groups_flat[index]
        for parameter in parameters:
            _, begin, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            ranks = parameter.ds_process_group
            first = dist.get_rank(ranks) * size
            inside = _clip(first, first + size, parameter.ds_numel)
            found[parameter] = _home(partition, group, parameter.ds_shape, begin - first, inside, ranks)
    return found


def _home(
    tensor: Tensor,
    group: dict[str, Any],
    shape: torch.Size,
    offset: int,
    inside: slice,
    ranks: dist.ProcessGroup | None = None,
) -> Home:
    here = slice(inside.start + offset, inside.stop + offset) if inside.stop > inside.start else slice(0, 0)
    return Home(tensor, group, shape, offset, inside, here, ranks)


def _clip(first: int, last: int, size: int) -> slice:
    """[first, last) within [0, size); empty if there is nothing."""
    first = min(max(0, first), size)
    return slice(first, max(first, min(last, size)))
