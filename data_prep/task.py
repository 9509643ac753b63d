"""A unit of work in this process: whatever ends it is an error that names it; what takes too long ends the process.

`python -m data_prep.task FOLDER` does the units of this task of a Slurm array, and says on stderr what went wrong.
"""

import faulthandler
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep import records
from data_prep.records import Unit
from moe import log
from moe.errors import DataError, TurnoutError, clean_exit

_LATE = "late"


def do(unit: Unit, minutes: float | None = None) -> None:
    """Raises `DataError` that names the unit. After `minutes` writes the stacks of all threads and ends the process."""
    try:
        with _watched(unit, minutes):
            records.do(unit)
    except TurnoutError as error:
        raise DataError(f"stage {unit}: {error}") from None
    except OSError as error:
        raise DataError(
            f"stage {unit}: {error.filename or unit.stage}: {error.strerror or error}. Check the disk and its "
            f"permissions, then run the same command again: what is finished stays."
        ) from None
    except (Exception, SystemExit) as error:  # SystemExit would end this process as if all were well
        log.get().error("%s", traceback.format_exc().strip())
        raise DataError(
            f"stage {unit}: {type(error).__name__}: {error}. The lines above say where. What is finished stays."
        ) from None


def late(stage: Path) -> list[str]:
    """The units of a stage that took too long; their stacks are in `.UNIT.*.late.unfinished` until `records.sweep`."""
    return sorted(
        {path.name.split(".")[1] for path in stage.glob(f".*.{_LATE}.unfinished") if path.stat().st_size}
    )


def stacks(stage: Path) -> str:
    """What those were doing."""
    return "\n".join(path.read_text() for path in sorted(stage.glob(f".*.{_LATE}.unfinished")))


def too_long(stage: str, units: list[str]) -> str:
    """The message for them."""
    return (
        f"stage {stage}: part {', '.join(units)} took longer than executor.part_minutes and was ended. What is "
        f"finished stays: look at the stacks above, then give it more minutes, or smaller parts (part_megabytes)."
    )


@contextmanager
def _watched(unit: Unit, minutes: float | None) -> Iterator[None]:
    """By a thread that needs no Python, so that code that holds the interpreter's lock is ended too."""
    if minutes is None:
        yield
        return
    unit.stage.mkdir(parents=True, exist_ok=True)
    path = records.scratch(unit, _LATE)
    with path.open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback_later(minutes * 60, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            path.unlink(missing_ok=True)


def main(folder: Path, number: int) -> None:
    """Do the units of task `number` that have no record yet. Raises `TurnoutError`."""
    from data_prep import on_slurm

    units, minutes = on_slurm.load(folder, number)
    for unit in units:
        if records.recorded(unit) is None:
            log.get().info("stage %s on %s", unit, socket.gethostname())
            do(unit, minutes)


if __name__ == "__main__":
    log.setup()
    with clean_exit():
        main(Path(sys.argv[1]), int(os.environ["SLURM_ARRAY_TASK_ID"]))
