"""Units of a stage -> processes of this machine; any failure ends the whole and names the unit.

`concurrent.futures` does the work: unlike `multiprocessing.Pool`, which datatrove's local executor uses and which
waits for ever for a worker that was killed, it says at once that one is gone.
"""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from data_prep import records
from data_prep.records import Unit
from moe import log
from moe.errors import DataError, TurnoutError

_SECONDS_BETWEEN_SENTENCES = 10.0
_PR_SET_PDEATHSIG = 1


@contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor | None]:
    """`count` processes that die with this one; None for a single one, which is this."""
    if count == 1:
        yield None
        return
    pool = ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(os.getpid(),),
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run(units: Sequence[Unit], pool: ProcessPoolExecutor | None) -> int:
    """Do all units that are not finished; the number of those. Raises `DataError` that names the unit that failed."""
    stage = units[0].stage
    records.sweep(stage)
    todo = [unit for unit in units if records.finished(unit) is None]
    if not todo:
        return 0
    spoke = time.monotonic()
    for number, unit in enumerate(_done(todo, pool), start=1):
        if time.monotonic() - spoke > _SECONDS_BETWEEN_SENTENCES:
            spoke = time.monotonic()
            log.get().info("%s: %d of %d parts done, %s last", stage.name, number, len(todo), unit.name)
    return len(todo)


def _done(units: Sequence[Unit], pool: ProcessPoolExecutor | None) -> Iterator[Unit]:
    if pool is None:
        for unit in units:
            _guarded(unit)
            yield unit
        return
    try:
        futures: dict[Future[None], Unit] = {pool.submit(_guarded, unit): unit for unit in units}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    except BrokenProcessPool:
        _wait_for_the_dead(pool)
        stage = units[0].stage
        begun = ", ".join(records.sweep(stage)) or "none yet"
        raise DataError(
            f"stage {stage.name}: a worker was killed (by the kernel, if memory ran out). Parts at work: {begun}. "
            f"What is finished stays: run the same command again, with a smaller executor.workers if memory is short."
        ) from None


def _wait_for_the_dead(pool: ProcessPoolExecutor) -> None:
    """The others are being ended too; what they leave is swept only then."""
    pool.shutdown(wait=True, cancel_futures=True)


def _guarded(unit: Unit) -> None:
    try:
        records.do(unit)
    except TurnoutError as error:
        raise DataError(f"stage {unit}: {error}") from None
    except OSError as error:
        raise DataError(
            f"stage {unit}: {error.filename or unit.stage}: {error.strerror or error}. Check the disk and its "
            f"permissions, then run the same command again: what is finished stays."
        ) from None


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and ends us
    atexit.register(
        os._exit, 0
    )  # to take all libraries apart costs a fifth of a second, and nothing waits for it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    log.setup()
