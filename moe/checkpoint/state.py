"""A running engine <-> logical tensors: each parameter's float32 master and moments, experts one by one.

Of a frozen parameter there is its value alone: in float32, whatever the dtype in which the model has it.

The key of a tensor is `STATE/PARAMETER` or, for one expert of a stacked parameter, `STATE/PARAMETER[EXPERT]`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe import optim
from moe.engine.engine import Engine
from moe.engine.groups import is_expert
from moe.engine.partition import Home, show

WEIGHT = "weight"
STEPS_SINCE_USE = "steps_since_use"
"""Key of the one tensor that no training step depends on; see `moe.sparse.health`."""


def key(state: str, name: str, expert: int | None = None) -> str:
    """The name of a tensor in a checkpoint."""
    return f"{state}/{name}" if expert is None else f"{state}/{name}[{expert}]"


def collect(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of the state: (key, tensor), float32 and on the engine's device, true until the next step.

    Collective: every rank runs through all of it.

    Replicated parameters are dealt out over all ranks; of the ranks that hold the same experts the first has
    them; buffers (selection biases) are equal everywhere and the first rank's. Together the parts are the whole
    state, each tensor once.
    """
    ranks = engine.ranks
    for turn, (name, parameter) in enumerate(engine.model.named_parameters()):
        for state in _states(engine, parameter):
            whole = _read(engine, parameter, state)
            if is_expert(parameter):
                if ranks.expert_data_rank == 0:
                    for expert, tensor in zip(_local_experts(engine), whole, strict=True):
                        yield key(state, name, expert), tensor
            elif ranks.rank == turn % ranks.world_size:
                yield key(state, name), whole
    if ranks.speaks:
        for name, buffer in engine.model.named_buffers():
            yield key(WEIGHT, name), buffer.detach()


def needed(engine: Engine) -> Iterator[tuple[nn.Parameter, str, list[str]]]:
    """(parameter, state, keys that make it up on this rank) for the whole state."""
    for name, parameter in engine.model.named_parameters():
        for state in _states(engine, parameter):
            if is_expert(parameter):
                yield parameter, state, [key(state, name, expert) for expert in _local_experts(engine)]
            else:
                yield parameter, state, [key(state, name)]


@torch.no_grad()
def write(engine: Engine, parameter: nn.Parameter, state: str, value: Tensor) -> None:
    """Set one state of one parameter from its full local float32 value; `publish` must follow the last one."""
    value = value.to(engine.ranks.device)
    home = engine.homes[parameter]
    kept = _tensor(engine, home, state)
    kept.view(-1)[home.here] = value.view(-1)[home.inside].to(kept.device)
    if state == WEIGHT:
        show(parameter, value, home)


@torch.no_grad()
def prepare(engine: Engine, step: int) -> None:
    """Make room for moments as if `step` optimizer steps had been taken; torch makes it only at the first."""
    state, done = _base(engine).state, set[Tensor]()
    for home in engine.homes.values():
        if home.tensor not in done and optim.states(home.group):
            state[home.tensor] = optim.fresh_state(home.group, home.tensor, step)
            done.add(home.tensor)


def _states(engine: Engine, parameter: nn.Parameter) -> tuple[str, ...]:
    """The weight, and what the optimizer remembers of it."""
    return (WEIGHT, *optim.states(engine.homes[parameter].group))


def _read(engine: Engine, parameter: nn.Parameter, state: str) -> Tensor:
    home = engine.homes[parameter]
    kept = _tensor(engine, home, state).float()  # frozen ones are kept as the model computes with them
    if home.ranks is None:
        return kept
    # On the ranks' device, where their collectives run, also if it is kept in host memory.
    whole = torch.zeros(home.numel, dtype=kept.dtype, device=engine.ranks.device)
    whole[home.inside] = kept[home.here].to(whole.device)
    dist.all_reduce(whole.view(torch.int32), group=home.ranks)  # as floats -0.0 + 0.0 would lose its sign
    return whole.view(home.shape)


def _tensor(engine: Engine, home: Home, state: str) -> Tensor:
    tensor: Tensor = home.tensor if state == WEIGHT else _base(engine).state[home.tensor][state]
    return tensor.detach()


def _base(engine: Engine) -> Any:
    """The torch optimizer under DeepSpeed's."""
    optimizer = engine.wrapped.optimizer
    return optimizer if engine.run.parallel.zero_stage == 0 else optimizer.optimizer


def _local_experts(engine: Engine) -> range:
    moe = engine.run.model.moe
    assert moe is not None
    local = moe.num_experts // engine.ranks.expert_parallel_size
    return range(engine.ranks.expert_rank * local, (engine.ranks.expert_rank + 1) * local)
