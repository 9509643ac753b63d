"""Run one function on N real processes (gloo, CPU) and fail like a normal test."""

import datetime
import faulthandler
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what ZeRO-3 and recomputing ask for in every rank, a second or two
import torch.distributed as dist
import torch.multiprocessing as mp

_UNTIL_STACKS, _IN_COLLECTIVE = 0.7, 0.8
"""Of the time that ranks are given: after so much each shows where it stands, and for so long it waits for others. The
first to give up a collective says which one it was, and by then a rank that is stuck elsewhere has shown its stack."""


def run_ranks(
    fn: Callable[..., None], world_size: int, tmp_path: Path, *args: object, timeout_s: float = 240
) -> None:
    """Call `fn(rank, *args)` on `world_size` forked ranks in one gloo group; raise the first failing traceback.

    Ranks meet through a file, so that tests side by side never race for a port. torch is imported already, so a
    case takes about a second.
    """
    context = mp.get_context("fork")
    errors = context.SimpleQueue()
    store = tmp_path / f"store-{time.monotonic_ns()}"
    ranks: list[Any] = [
        context.Process(
            target=_one_rank, args=(rank, world_size, store, timeout_s, errors, fn, args), daemon=True
        )
        for rank in range(world_size)
    ]
    _come_to_rest()
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.is_alive() for process in ranks):
            if any(process.exitcode not in (None, 0) for process in ranks) or not errors.empty():
                break  # a rank that has failed may hang in its end
            assert time.monotonic() < deadline, f"{fn.__name__} hung: {world_size} ranks, {timeout_s:.0f} s"
            time.sleep(0.02)
        if not errors.empty():
            raise AssertionError(errors.get())
        codes = [process.exitcode for process in ranks]
        assert not any(codes), f"{fn.__name__}: exit codes {codes} without a traceback"
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


def _come_to_rest(seconds: float = 5.0) -> None:
    """Wait until no other thread of this process runs: a lock that it holds when ranks are forked, they find locked.

    A thread that Python has joined may still be about to end, and give back what torch's libraries kept for it.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(map(_is_running, Path("/proc/self/task").glob("*"))):
        time.sleep(0.005)


def _is_running(task: Path) -> bool:
    with suppress(OSError):  # it has ended
        state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        return task.name != str(threading.get_native_id()) and state in ("R", "D")
    return False


def _one_rank(
    rank: int, world_size: int, store: Path, timeout_s: float, errors: Any, fn: Callable[..., None], args: Any
) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(_UNTIL_STACKS * timeout_s)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=_IN_COLLECTIVE * timeout_s),
        )
        fn(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        errors.put(f"rank {rank} of {world_size} failed in {fn.__name__}:\n{traceback.format_exc()}")
        raise
