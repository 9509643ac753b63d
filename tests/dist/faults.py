"""The field's silent faults, each planted in the ranks of one training: losses look healthy, the training is wrong."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.certify.seen import Job


def plant(faults: Mapping[str, str], job: Job) -> None:
    """Put the fault that `faults` names for this job's layout ("" for all) in place, and take the last one out."""
    planted.close()
    name = faults.get(str(job.layout), faults.get("", ""))
    for target, make in FAULTS[name] if name else ():
        planted.enter_context(_patched(target, make))


planted = ExitStack()


def _patched(target: str, make: Callable[[Any], Any]) -> Any:
    module, _, name = target.rpartition(".")
    owner: Any
    try:
        owner = import_module(module)
    except ModuleNotFoundError:  # a class in it
        outer, _, cls = module.rpartition(".")
        owner = getattr(import_module(outer), cls)
    return patch.object(owner, name, make(getattr(owner, name)))


def _scaled_experts(adopt: Any) -> Any:
    def faulty(model: nn.Module) -> None:
        adopt(model)
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.register_hook(lambda grad: grad * 2)

    return faulty


def _norm_of_this_rank(clip: Any) -> Any:
    """As `moe.engine.clip`, but experts elsewhere are forgotten."""

    def faulty(model: nn.Module, ranks: Any, max_norm: float) -> Tensor:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
        for grad in grads:
            grad.mul_(float((max_norm / (norm + 1e-6)).clamp(max=1.0)))
        return norm

    return faulty


def _mean_of_local_norms(clip: Any) -> Any:
    """As DeepSpeed 0.19.8 clips under ZeRO 0 (DeepSpeed#8475)."""

    def faulty(model: nn.Module, ranks: Any, max_norm: float) -> Tensor:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
        dist.all_reduce(norm)
        norm /= ranks.world_size
        for grad in grads:
            grad.mul_(float((max_norm / (norm + 1e-6)).clamp(max=1.0)))
        return norm

    return faulty


def _twice(scopes: Any) -> Any:
    return lambda *args: scopes(*args) * 2


def _gradient_twice(balance: Any) -> Any:
    def faulty(*args: Any) -> Tensor:
        loss = balance(*args)
        return 2 * loss - loss.detach()

    return faulty


def _backwards(step: Any) -> Any:
    return lambda *args: -step(*args)


def _without_momentum(write: Any) -> Any:
    def faulty(engine: Any, parameter: Any, state: str, value: Tensor) -> None:
        if state != "exp_avg":
            write(engine, parameter, state, value)

    return faulty


def _mask_forgotten_in_counts(count: Any) -> Any:
    return lambda ids_TK, kept, num_experts: count(ids_TK, None, num_experts)


def _mask_forgotten_in_head(forward: Any) -> Any:
    def faulty(self: Any, h_BSD: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> Any:
        return forward(self, h_BSD, labels_BS, torch.ones_like(mask_BS))

    return faulty


def _dies(step: Any) -> Any:
    def faulty(engine: Any, *args: Any, **more: Any) -> Any:
        if engine.ranks.rank == 1:
            raise RuntimeError("no such luck")
        return step(engine, *args, **more)

    return faulty


def _hangs(step: Any) -> Any:
    def faulty(engine: Any, *args: Any, **more: Any) -> Any:
        time.sleep(3600)

    return faulty


FAULTS: dict[str, list[tuple[str, Callable[[Any], Any]]]] = {
    "expert gradients doubled": [("moe.engine.engine.adopt", _scaled_experts)],
    "each rank's own norm": [("moe.engine.engine.clip_gradients", _norm_of_this_rank)],
    "mean of local norms": [("moe.engine.engine.clip_gradients", _mean_of_local_norms)],
    "balancing twice": [("moe.loss._scopes", _twice)],
    "balancing twice in gradients": [("moe.sparse.balance.global_balance", _gradient_twice)],
    "bias backwards": [("moe.sparse.balance.bias_step", _backwards)],
    # Training itself compares a state that it read for another layout with what was saved: without that, too.
    "momentum dropped": [
        ("moe.checkpoint.state.write", _without_momentum),
        ("moe.checkpoint.resume.prove", lambda prove: lambda *args: None),
    ],
    "padding counted": [("moe.sparse.router.count_choices", _mask_forgotten_in_counts)],
    "padding in the loss": [("moe.model.head.Head.forward", _mask_forgotten_in_head)],
    "dies": [("moe.engine.engine.Engine.step", _dies)],
    "hangs": [("moe.engine.engine.Engine.step", _hangs)],
}
