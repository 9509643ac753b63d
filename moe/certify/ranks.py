"""Jobs for one number of ranks -> what each of them saw, on processes of this machine; nothing waits for ever."""

import ctypes
import datetime
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe import log
from moe.certify.seen import Job, Seen, read, write
from moe.errors import TurnoutError

JOB_SECONDS = 180.0
START_SECONDS = 180.0
_POLL_SECONDS, _GRACE_SECONDS = 0.05, 2.0

Plant = Callable[[Job], None]
Report = Callable[[Job], None]


@dataclass(frozen=True)
class Fault:
    """Why a job did not end."""

    message: str


def run(
    jobs: Sequence[Job], folder: Path, report: Report, plant: Plant | None = None, job_s: float = JOB_SECONDS
) -> dict[str, Seen | Fault]:
    """Do `jobs`, all of one world size, in turn; those after a failed one on fresh processes.

    `report` is called as each ends, `plant` in every rank before each job.
    """
    found: dict[str, Seen | Fault] = {}
    left = list(jobs)
    while left:
        fault = _launch(left, folder, report, plant, job_s)
        done = [job for job in left if (folder / f"{job.name}.pt").exists()]
        found |= {job.name: read(folder / f"{job.name}.pt") for job in done}
        left = left[len(done) :]
        if left:
            found[left[0].name] = Fault(fault or "the processes ended without a word")
            report(left[0])
            left = left[1:]
    return found


def devices(world_size: int) -> list[torch.device]:
    """A GPU for each rank if there are enough, else the CPU for all."""
    if torch.cuda.device_count() >= world_size:
        return [torch.device("cuda", rank) for rank in range(world_size)]
    return [torch.device("cpu")] * world_size


def _launch(
    jobs: Sequence[Job], folder: Path, report: Report, plant: Plant | None, job_s: float
) -> str | None:
    """Start processes for `jobs` and wait for their end; what the first failing rank said."""
    world_size = jobs[0].layout.world
    here = folder / f"ranks-{time.monotonic_ns()}"
    here.mkdir()
    context = _context(devices(world_size))
    ranks = [
        context.Process(
            target=_rank, args=(rank, world_size, tuple(jobs), folder, here, plant, job_s), daemon=True
        )
        for rank in range(world_size)
    ]
    try:
        for process in ranks:
            process.start()
        return _wait(ranks, jobs, folder, here, report, job_s)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


def _context(chosen: Sequence[torch.device]) -> Any:
    if chosen[0].type == "cuda":
        return multiprocessing.get_context("spawn")  # a process with CUDA in use must not fork
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // len(chosen))))
    context = multiprocessing.get_context("forkserver")
    # What is slow to import is imported once; DeepSpeed asks for the last two when an engine starts.
    context.set_forkserver_preload(["moe.certify.measure", "torch._dynamo", "torch._inductor.compile_fx"])
    return context


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wait(
    ranks: Sequence[Any], jobs: Sequence[Job], folder: Path, here: Path, report: Report, job_s: float
) -> str | None:
    left, begun = list(jobs), False
    deadline = time.monotonic() + START_SECONDS
    while True:
        if not begun and (here / "begun").exists():
            begun, deadline = True, time.monotonic() + job_s
        ended = not any(process.is_alive() for process in ranks)
        failed = any(process.exitcode not in (None, 0) for process in ranks)
        while left and (folder / f"{left[0].name}.pt").exists():
            report(left.pop(0))
            deadline = time.monotonic() + job_s
        if failed:
            return _first_word(here, ranks)
        if ended:
            return None
        if time.monotonic() > deadline:
            return (
                f"it did not {'end' if begun else 'start'} within {job_s if begun else START_SECONDS:.0f} s"
            )
        time.sleep(_POLL_SECONDS)


def _first_word(here: Path, ranks: Sequence[Any]) -> str:
    """What the rank that failed first said; the others fail after it, because it is gone."""
    until = time.monotonic() + _GRACE_SECONDS
    said: list[Path] = []
    while not said and time.monotonic() < until:
        said = sorted(here.glob("*.said"), key=lambda path: path.stat().st_mtime_ns)
        time.sleep(_POLL_SECONDS)
    if said:
        return f"rank {said[0].stem}: {said[0].read_text(encoding='utf-8')}"
    rank, code = next((r, p.exitcode) for r, p in enumerate(ranks) if p.exitcode not in (None, 0))
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return f"rank {rank} ended {how}"


def _rank(
    rank: int,
    world_size: int,
    jobs: Sequence[Job],
    folder: Path,
    here: Path,
    plant: Plant | None,
    job_s: float,
) -> None:
    """One rank: all jobs in turn; its last words go into a file."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _into_file(here / f"{rank}.log")
    log.setup(rank)
    try:
        from moe.certify.measure import observe, ranks_of

        chosen = devices(world_size)[rank]
        torch.set_num_threads(max(1, _cores() // world_size))
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=dist.FileStore(str(here / "store"), world_size),  # type: ignore[attr-defined]  # exported at run time only
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=job_s),
        )
        (here / "begun").touch()
        for job in jobs:
            if plant is not None:
                plant(job)
            seen = observe(job, ranks_of(rank, job.layout, chosen))
            if rank == 0:
                write(seen, folder / f"{job.name}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        words = str(error) if isinstance(error, TurnoutError) else traceback.format_exc()
        partial = here / f"{rank}.part"
        partial.write_text(words, encoding="utf-8")
        partial.rename(here / f"{rank}.said")
        os._exit(1)  # no farewell: other ranks may wait in a collective for ever


def _into_file(path: Path) -> None:
    """What DeepSpeed and gloo print is nobody's table."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        with suppress(OSError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
