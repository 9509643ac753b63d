"""A recipe -> an initialised model: this rank's experts alone and, under ZeRO 3, this rank's pieces alone."""

import os

import torch
from torch import Tensor, nn

from moe.config import RunConfig, check_world
from moe.dist import Ranks
from moe.engine import ds_config
from moe.engine.groups import adopt, partition_experts_by_group
from moe.engine.library import deepspeed
from moe.errors import ConfigError
from moe.model import SequenceGroup, Transformer, count, initialize
from moe.model.init import fill
from moe.model.lora import adapt, fill_adapters
from moe.sparse import Capacity, ExpertLayout, deepep


def build(run: RunConfig, ranks: Ranks) -> Transformer:
    """The model of a run, its weights drawn from the seed. Collective; raises `ConfigError` if memory is short.

    No rank ever holds all experts. Under ZeRO 3 no rank ever holds more than one layer whole.
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
            _fill_and_shard(model, run, ranks)
        else:
            initialize(model, run.seed)
            fill_adapters(model, "", run.seed)
    except (RuntimeError, MemoryError) as error:  # torch's allocator says no
        raise ConfigError(
            f"model: {count(run.model, run.data.sequence_length).sentence()}, which this rank cannot hold ({error}). "
            f"Use a smaller model, or more ranks with a larger parallel.expert_parallel_size or zero_stage 3."
        ) from None
    return model


def _fill_and_shard(model: Transformer, run: RunConfig, ranks: Ranks) -> None:
    """Give memory to one part after the other, draw its weights, and leave this rank's piece of each."""
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    deepspeed.init_distributed(dist_init_required=False)
    config = ds_config.make(run, check_world(run, ranks.world_size))
    adopt(model)
    partition_experts_by_group(model)
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    made: dict[nn.Parameter, nn.Parameter] = {}
    layers = [(f"layers.{index}", layer) for index, layer in enumerate(model.layers)]
    parts = [("embed", model.embed), *layers, ("norm", model.norm), ("head", model.head)]
    for name, part in parts:
        _materialize(part, ranks.device, made)
        fill(part, name, run.model, run.seed)
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


def _materialize(part: nn.Module, device: torch.device, made: dict[nn.Parameter, nn.Parameter]) -> None:
    """Replace what is on the meta device: weights uninitialised, buffers zero, as selection biases begin."""
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                empty = torch.empty(parameter.shape, dtype=torch.float32, device=device)
                fresh = nn.Parameter(empty, parameter.requires_grad)
                vars(fresh).update(vars(parameter))  # DeepSpeed's marks
                made[parameter] = fresh
            setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=device))
