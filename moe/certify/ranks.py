"""Jobs for one number of ranks -> what each of them saw, on processes of this machine; nothing waits for ever."""

import datetime
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe import log
from moe.certify.seen import Job, Seen, read, write
from moe.errors import TurnoutError
from moe.orphans import die_with_parent

JOB_SECONDS = 180.0
START_SECONDS = 180.0
_POLL_SECONDS, _GRACE_SECONDS = 0.05, 2.0

Plant = Callable[[Job], None]
Report = Callable[[Job], None]


@dataclass(frozen=True)
class Fault:
    """Why a job did not end."""

    message: str


@dataclass(frozen=True)
class Place:
    """Where processes run."""

    folder: Path
    """For what they see and say."""
    device: str
    """Of all: cpu or cuda."""
    job_s: float = JOB_SECONDS
    """How long a job may take."""

    def device_of(self, rank: int) -> torch.device:
        return torch.device("cuda", rank) if self.device == "cuda" else torch.device("cpu")


def device(world_size: int) -> str:
    """GPUs if there is one for each of so many ranks, else the CPU: all that is compared is computed alike."""
    return "cuda" if torch.cuda.device_count() >= world_size else "cpu"


def run(
    jobs: Sequence[Job], place: Place, report: Report, plant: Plant | None = None
) -> dict[str, Seen | Fault]:
    """Do `jobs`, all of one world size, in turn; those after a failed one on fresh processes.

    `report` is called as each ends, `plant` in every rank before each job.
    """
    found: dict[str, Seen | Fault] = {}
    left = list(jobs)
    while left:
        fault = _launch(left, place, report, plant)
        done = [job for job in left if (place.folder / f"{job.name}.pt").exists()]
        found |= {job.name: read(place.folder / f"{job.name}.pt") for job in done}
        left = left[len(done) :]
        if left:
            found[left[0].name] = Fault(fault or "the processes ended without a word")
            report(left[0])
            left = left[1:]
    return found


def _launch(jobs: Sequence[Job], place: Place, report: Report, plant: Plant | None) -> str | None:
    """Start processes for `jobs` and wait for their end; what the first failing rank said."""
    world_size = jobs[0].layout.world
    here = place.folder / f"ranks-{time.monotonic_ns()}"
    here.mkdir()
    with _environment(place, world_size):
        context = _context(place)
        ranks = [
            context.Process(
                target=_rank, args=(rank, world_size, tuple(jobs), place, here, plant), daemon=True
            )
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            return _wait(ranks, jobs, place, here, report)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()


@contextmanager
def _environment(place: Place, world_size: int) -> Iterator[None]:
    """What processes find in theirs, and none of it in ours after."""
    wanted = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, _cores() // world_size)))}
    if place.device == "cpu":
        wanted |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _context(place: Place) -> Any:
    if place.device == "cuda":
        return multiprocessing.get_context("spawn")  # a process with CUDA in use must not fork
    context = multiprocessing.get_context("forkserver")
    # What is slow to import is imported once; ZeRO-3 and recomputing ask for the last.
    context.set_forkserver_preload([__name__, "moe.certify.measure", "torch._dynamo"])
    return context


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wait(ranks: Sequence[Any], jobs: Sequence[Job], place: Place, here: Path, report: Report) -> str | None:
    left, begun = list(jobs), False
    deadline = time.monotonic() + START_SECONDS
    while True:
        if not begun and (here / "begun").exists():
            begun, deadline = True, time.monotonic() + place.job_s
        ended = not any(process.is_alive() for process in ranks)
        failed = any(process.exitcode not in (None, 0) for process in ranks)
        while left and (place.folder / f"{left[0].name}.pt").exists():
            report(left.pop(0))
            deadline = time.monotonic() + place.job_s
        if failed:
            return _first_word(here, ranks)
        if ended:
            return None
        if time.monotonic() > deadline:
            return (
                f"it did not end within {place.job_s:.0f} s"
                if begun
                else f"it did not start within {START_SECONDS:.0f} s"
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
    place: Place,
    here: Path,
    plant: Plant | None,
) -> None:
    """One rank: all jobs in turn; its last words go into a file."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _into_file(here / f"{rank}.log")
    log.setup(rank)
    try:
        from moe.certify.measure import observe, ranks_of

        chosen = place.device_of(rank)
        torch.set_num_threads(max(1, _cores() // world_size))
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=dist.FileStore(str(here / "store"), world_size),  # type: ignore[attr-defined]  # exported at run time only
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=place.job_s),
        )
        (here / "begun").touch()
        for job in jobs:
            if plant is not None:
                plant(job)
            seen = observe(job, ranks_of(rank, job.layout, chosen))
            if rank == 0:
                write(seen, place.folder / f"{job.name}.pt")
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
