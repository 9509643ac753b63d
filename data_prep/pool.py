"""Units of a stage -> processes of this machine; any failure ends the whole and names the unit.

`concurrent.futures` does the work: unlike `multiprocessing.Pool`, which datatrove's local executor uses and which
waits for ever for a worker that was killed, it says at once that one is gone.

Processes are forked where this one has a single thread of Python's: they are there at once, and import nothing anew,
which else takes longer than to encode 50 MB. The threads of numpy and pyarrow know of forks.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa

from data_prep import records, task
from data_prep.records import Unit
from data_prep.treatment import LocalExecutor
from moe import log
from moe.errors import DataError
from moe.orphans import die_with_parent


@dataclass(frozen=True)
class Local:
    """Processes of this machine; None: this one."""

    pool: ProcessPoolExecutor | None
    part_minutes: float | None = None

    def do(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """As `executors.Workers`."""
        if self.pool is None:
            for unit in units:
                task.do(unit)
                yield unit
            return
        try:
            futures: dict[Future[None], Unit] = {
                self.pool.submit(task.do, unit, self.part_minutes): unit for unit in units
            }
            try:
                for future in as_completed(futures):
                    future.result()
                    yield futures[future]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        except BrokenProcessPool:
            # The others are being ended too; what they leave is swept only then.
            self.pool.shutdown(wait=True, cancel_futures=True)
            raise _killed(units[0]) from None

    def plan(self, units: Sequence[Unit]) -> str:
        """As `executors.Workers`."""
        return ""


@contextmanager
def workers(config: LocalExecutor) -> Iterator[Local]:
    """Processes that die with this one; a single one without a limit of time is this."""
    count = config.workers or os.cpu_count() or 1
    if count == 1 and config.part_minutes is None:
        yield Local(None)
        return
    # Another thread may hold a lock, for which a fork would wait for ever.
    is_alone = sys.platform == "linux" and threading.active_count() == 1
    pool = ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("fork" if is_alone else "spawn"),
        initializer=_begin,
        initargs=(os.getpid(),),
    )
    try:
        if is_alone:
            pool.submit(os.getpid)  # which forks them all, before there is a thread of a progress bar
        yield Local(pool, config.part_minutes)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _killed(unit: Unit) -> DataError:
    stage = unit.stage
    if late := task.late(stage):
        log.get().error("%s", task.stacks(stage))
        records.sweep(stage)
        return DataError(task.too_long(stage.name, late))
    begun = ", ".join(records.sweep(stage)) or "none yet"
    return DataError(
        f"stage {stage.name}: a worker was killed (by the kernel, if memory ran out). Parts at work: {begun}. "
        f"What is finished stays: run the same command again, with a smaller executor.workers if memory is short."
    )


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which does: the parent's own handler came with the fork
    # To take all libraries apart costs a fifth of a second, and nothing waits for it.
    atexit.register(os._exit, 0)
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    pa.set_memory_pool(
        pa.system_memory_pool()
    )  # Arrow's own keeps what is free, and grows with what it has had
    log.setup()
