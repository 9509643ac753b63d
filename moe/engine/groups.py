"""Our sparse layer -> a layer that DeepSpeed treats as expert parallel.

DeepSpeed decides by type and by attributes of parameters. Measured with 0.19.8: a plain module with the
attributes below crashes under ZeRO 0 to 2; without them it trains silently wrong; a subclass of AutoEPMoELayer
is exact under ZeRO 1 to 3. Its own checkpoints also want experts named w1, w2, w3; ours are written by
`moe.checkpoint` from logical tensors, so the fused gate-up weight needs no alias.
"""

from typing import Any

from torch import nn

from moe.engine.library import deepspeed  # noqa: F401  (must come first)
from moe.sparse import SparseMoE

from deepspeed.checkpoint.autoep_affine import legacy_uniform_autoep_placement_descriptor  # isort: skip
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer  # isort: skip
from deepspeed.utils import groups, set_z3_leaf_module  # isort: skip


class PlacedMoE(SparseMoE):
    """A `SparseMoE` of which DeepSpeed knows who holds which experts; never constructed, see `adopt`.

    As it is, its experts must be frozen: gradients of a plain module's would be reduced wrong.
    """

    ep_size: int
    ep_rank: int
    ep_group_name: str
    num_experts: int
    num_local_experts: int
    expert_placement_descriptor: Any

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: Any = None
    ) -> None:
        """Called by `deepspeed.initialize`: make the groups that reduce expert gradients."""
        if self.ep_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )


class ExpertParallelMoE(PlacedMoE, AutoEPMoELayer):
    """The same, in DeepSpeed's eyes a layer with experts to train.

    Where none is trained no layer may be of this class: ZeRO 1 and 2 then ask for a group of experts (0.19.8).
    """


def adopt(model: nn.Module) -> None:
    """Turn every `SparseMoE` of `model`, in place, into a `PlacedMoE` with marked expert weights."""
    for module in model.modules():
        if isinstance(module, SparseMoE) and not isinstance(module, PlacedMoE):
            _adopt(module)


def partition_experts_by_group(model: nn.Module) -> None:
    """Make ZeRO 3 cut experts up among the ranks that hold the same ones, not among all. Collective."""
    for layer in model.modules():
        if isinstance(layer, PlacedMoE):
            layer.set_deepspeed_parallelism()
            ranks = groups._get_expert_data_parallel_group(layer.ep_group_name)
            for parameter in layer.experts.parameters():
                parameter.ds_zero_partition_process_group = ranks  # type: ignore[attr-defined]  # DeepSpeed's mark


def _adopt(layer: SparseMoE) -> None:
    layout = layer.layout
    is_trained = any(parameter.requires_grad for parameter in layer.experts.parameters())
    layer.__class__ = ExpertParallelMoE if is_trained else PlacedMoE
    assert isinstance(layer, PlacedMoE)
    layer.ep_size, layer.ep_rank = layout.size, layout.rank
    layer.ep_group_name = f"ep_size_{layout.size}"
    layer.num_experts, layer.num_local_experts = layout.num_experts, layout.num_local_experts
    layer.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
        layout.num_experts, layout.num_local_experts, layout.size
    )
    marks = {
        "allreduce": False,
        "group_name": layer.ep_group_name,
        "ds_zero_placement_family": "autoep_expert",
        "ds_zero_partition_group_name": layer.ep_group_name,
        "is_expert_group": True,
    }
    # ZeRO 3 then gathers the whole layer when it is entered, forward and backward. Its inner modules pass dataclasses
    # on, in which DeepSpeed's hooks see no tensor, and would find their weights gone in backward.
    set_z3_leaf_module(layer, True)
    for parameter in layer.experts.parameters():
        for name, value in marks.items():
            setattr(parameter, name, value)


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether ranks of an expert-parallel group hold different slices of this parameter."""
    return not getattr(parameter, "allreduce", True)
