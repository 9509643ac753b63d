"""Launcher environment -> ranks, devices and process groups, passed on as values."""

import atexit
import datetime
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from moe.config import ParallelConfig
from moe.errors import LaunchError

Group = dist.ProcessGroup
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. One process without torch.distributed has no groups."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    expert_parallel_size: int = 1
    expert_group: Group | None = None
    """The consecutive ranks that share the experts of a layer."""
    sequence_parallel_size: int = 1
    sequence_group: Group | None = None
    """The consecutive ranks that share sequences, each with a part of every one's positions."""
    control_group: Group | None = None
    """All ranks over gloo, for small agreements that must not wait for the device."""

    @property
    def expert_rank(self) -> int:
        """Position in the expert-parallel group."""
        return self.rank % self.expert_parallel_size

    @property
    def expert_data_rank(self) -> int:
        """Position among the ranks that hold the same experts."""
        return self.rank // self.expert_parallel_size

    @property
    def data_rank(self) -> int:
        """Position among the groups that share sequences: which rows of the global batch are here."""
        return self.rank // self.sequence_parallel_size

    @property
    def data_world_size(self) -> int:
        """The number of these groups."""
        return self.world_size // self.sequence_parallel_size

    def positions(self, length: int) -> slice:
        """Which positions of a sequence of `length` are here."""
        here = length // self.sequence_parallel_size
        first = self.rank % self.sequence_parallel_size * here
        return slice(first, first + here)

    @property
    def speaks(self) -> bool:
        """Whether this is the rank that talks to the user and owns the run folder."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place; returns `tensor`."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_over_sequence(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that share sequences, in place; returns `tensor`."""
        if self.sequence_parallel_size > 1:
            dist.all_reduce(tensor, group=self.sequence_group)
        return tensor

    def sum_all(self, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Each summed over all ranks, in its dtype, in one collective; None stays None.

        The sum is made in float64, where integers are exact up to 2^53.
        """
        given = [tensor for tensor in tensors if tensor is not None]
        flat = self.sum(torch.cat([tensor.double().flatten() for tensor in given]))
        sums = iter(flat.split([tensor.numel() for tensor in given]))
        return [
            None if tensor is None else next(sums).view(tensor.shape).to(tensor.dtype) for tensor in tensors
        ]

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Largest of all ranks, element by element, in place; returns `tensor`."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes; all ranks get the same answer. Never waits for the device."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.control_group)
        return bool(votes)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order, on every rank; for small plain data."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return cast("list[T]", values)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier(group=self.control_group)


def beside(ranks: Ranks, timeout_minutes: float) -> Ranks:
    """The same ranks with a control group of their own, for a thread beside training. Collective.

    Two threads must not use one group: which rank's call meets which would be a matter of chance.
    """
    if ranks.world_size == 1:
        return ranks
    timeout = datetime.timedelta(minutes=timeout_minutes)
    return replace(ranks, control_group=dist.new_group(backend="gloo", timeout=timeout))


def world_size_from_environment() -> int:
    """The number of ranks that a launcher announced; 1 without a launcher.

    Raises `LaunchError` if what was announced, the rank included, cannot be.
    """
    world_size = _announced("WORLD_SIZE", "SLURM_NTASKS", least=1, otherwise=1)
    rank = _announced("RANK", "SLURM_PROCID", least=0, otherwise=0)
    _announced("LOCAL_RANK", "SLURM_LOCALID", least=0, otherwise=0)
    _announced("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", least=1, otherwise=1)
    if rank >= world_size:
        raise LaunchError(
            f"the environment says rank {rank}, but a world size of {world_size}: ranks count from 0 to "
            f"{world_size - 1}. Export WORLD_SIZE with RANK, or unset both, or start through a launcher."
        )
    return world_size


def rank_from_environment() -> int:
    """This process's rank as the launcher announced it; 0 without a launcher.

    Also 0 where `world_size_from_environment` raises: that process speaks to the user.
    """
    try:
        world_size_from_environment()
    except LaunchError:
        return 0
    return _announced("RANK", "SLURM_PROCID", least=0, otherwise=0)


def _announced(*names: str, least: int, otherwise: int) -> int:
    """The first variable that is set, as a number."""
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return otherwise
    text = os.environ[name]
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number < 2**31:
        raise LaunchError(
            f"{name} is {text[:60]!r} in the environment: it must be a whole number, {least} or more. "
            f"Correct or unset it, or start through a launcher."
        )
    return number


@contextmanager
def start(parallel: ParallelConfig) -> Iterator[Ranks]:
    """Join the process group that the launcher describes and make the groups of consecutive ranks.

    Works under deepspeed, torchrun, accelerate, srun, and plain python (one rank). NCCL with CUDA, else gloo.
    Raises `LaunchError` if the environment is incomplete.
    """
    rank, world_size = rank_from_environment(), world_size_from_environment()
    local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)
    device = _device(local_rank)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    timeout = datetime.timedelta(minutes=parallel.timeout_minutes)
    _join(rank, world_size, device, timeout)
    try:
        yield Ranks(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            device=device,
            expert_parallel_size=parallel.expert_parallel_size,
            expert_group=consecutive(parallel.expert_parallel_size, timeout),
            sequence_parallel_size=parallel.sequence_parallel_size,
            sequence_group=consecutive(parallel.sequence_parallel_size, timeout),
            control_group=dist.new_group(backend="gloo", timeout=timeout),
        )
    finally:
        dist.destroy_process_group()


@contextmanager
def end_of_rank() -> Iterator[None]:
    """However the block ends, the process ends, with the exit code that Python would give; nothing comes after it.

    Threads are waited for, exit functions run, streams are flushed; the interpreter is not taken down. A thread of
    gloo may still hold the last collective's tensors: to let go of one it asks for the interpreter, and where that is
    being taken down, the process is aborted ("terminate called without an active exception", torch 2.13).
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException as error:
        here = error.__traceback__
        sys.excepthook(type(error), error.with_traceback(here and here.tb_next), here)
        code = 1
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # what Python itself calls here
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def consecutive(size: int, timeout: datetime.timedelta | None = None) -> Group | None:
    """Of the groups of `size` consecutive ranks the one that this rank is in; None for 1. Collective over all ranks."""
    if size == 1:
        return None
    mine = None
    for first in range(0, dist.get_world_size(), size):
        members = list(range(first, first + size))
        group = dist.new_group(members, timeout=timeout)
        if dist.get_rank() in members:
            mine = group
    return mine


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}. "
            f"Start at most that many processes per node."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join(rank: int, world_size: int, device: torch.device, timeout: datetime.timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]  # exported at run time only
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise LaunchError(
            f"{world_size} ranks were announced, but {' and '.join(missing)} not set: ranks cannot meet. "
            f"Export them, or start through `turnout train --nproc`, deepspeed, torchrun or accelerate."
        )
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
