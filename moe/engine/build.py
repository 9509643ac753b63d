"""A recipe -> an initialised model: this rank's experts alone and, under ZeRO 3, this rank's pieces alone."""

import os

import torch
from torch import Tensor, nn

from moe.config import RunConfig, check_world
from moe.dist import Ranks
from moe.engine import ds_config
from moe.engine.groups import adopt, partition_experts_by_group
from moe.engine.library import deepspeed
from moe.errors import CheckpointError, ConfigError
from moe.model import SequenceGroup, Transformer, count
from moe.model.init import fill
from moe.model.lora import adapt, fill_adapters
from moe.model.source import Weights, copy, materialize
from moe.sparse import Capacity, ExpertLayout, deepep


def build(run: RunConfig, ranks: Ranks, weights: Weights | None = None) -> Transformer:
    """The model of a run, its weights copied from `weights`, or drawn from the seed. Collective.

    Raises `ConfigError` if memory is short, `CheckpointError` if `weights` cannot be read. No rank ever holds, or
    reads, all experts. Under ZeRO 3 no rank ever holds more than one layer whole.
    """
    layout = ExpertLayout(
        run.model.moe.num_experts if run.model.moe else 1,
        ranks.expert_parallel_size,
        ranks.expert_rank,
        ranks.expert_group,
    )
    width = (run.model.moe and run.model.moe.latent_size) or run.model.hidden_size
    dispatcher = deepep.start(layout, width) if run.parallel.dispatch == "deepep" else None
    sequence_group = SequenceGroup(ranks.sequence_parallel_size, ranks.sequence_group)
    sharded = run.parallel.zero_stage == 3
    try:
        with torch.device("meta" if sharded else "cpu"):
            recompute, capacity = run.train.activation_recomputation, Capacity.of(run.balance)
            model = Transformer(run.model, layout, recompute, capacity, dispatcher, sequence_group)
            adapt(model, run.lora)
        if sharded:
            _fill_and_shard(model, run, ranks, weights)
        else:
            _fill(model, "", run, weights)
            fill_adapters(model, "", run.seed)
    except (RuntimeError, MemoryError) as error:  # torch's allocator says no
        raise ConfigError(
            f"model: {count(run.model, run.data.sequence_length).sentence()}, which this rank cannot hold ({error}). "
            f"Use a smaller model, or more ranks with a larger parallel.expert_parallel_size or zero_stage 3."
        ) from None
    return model


def _fill(part: nn.Module, place: str, run: RunConfig, weights: Weights | None) -> None:
    """Draw or copy the weights of the model's part that stands at `place`."""
    if weights is None:
        fill(part, place, run.model, run.seed)
        return
    try:
        copy(part, place, weights)
    except CheckpointError as error:
        error.local = True  # other ranks read other experts
        raise


def _fill_and_shard(model: Transformer, run: RunConfig, ranks: Ranks, weights: Weights | None) -> None:
    """Give memory to one part after the other, fill it, and leave this rank's piece of each."""
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    deepspeed.init_distributed(dist_init_required=False)
    config = ds_config.make(run, check_world(run, ranks.world_size))
    adopt(model)
    partition_experts_by_group(model)
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    made: dict[nn.Parameter, nn.Parameter] = {}
    layers = [(f"layers.{index}", layer) for index, layer in enumerate(model.layers)]
    further = [(f"predictions.{index}", module) for index, module in enumerate(model.predictions)]
    parts = [("embed", model.embed), *layers, ("norm", model.norm), *further, ("head", model.head)]
    for name, part in parts:
        materialize(part, ranks.device, torch.float32, made)
        _fill(part, name, run, weights)
        fill_adapters(part, name, run.seed)
        for parameter in part.parameters():
            if not hasattr(parameter, "ds_id"):  # a tied weight has its pieces already
                parameter.data = parameter.data.to(dtype)
        deepspeed.zero.Init(module=part, config_dict_or_path=config)
    if run.lora is not None:
        model.embed.register_forward_hook(_require_gradient)


def _require_gradient(_part: nn.Module, _inputs: object, x_BSD: Tensor) -> Tensor:
    """Have backward go down to the first layer's input, although nothing below it is trained.

    DeepSpeed 0.19.8 learns from a gradient of its input that a module is done; where none comes, it takes weights away
    while they are needed.
    """
    return x_BSD.requires_grad_(torch.is_grad_enabled())
