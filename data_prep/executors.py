"""Units of a stage -> whoever works on them, and a judgement by the records that they leave, whatever they say."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from data_prep import on_ray, pool, progress, records
from data_prep.on_slurm import Slurm
from data_prep.records import Unit
from data_prep.treatment import Executor, LocalExecutor, RayExecutor, SlurmExecutor
from moe.errors import DataError


class Workers(Protocol):
    """Who does units."""

    def do(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Each as it ends well. Raises `TurnoutError` that names the unit that did not, and ends the others."""
        ...

    def plan(self, units: Sequence[Unit]) -> str:
        """What a dry run shows beside their number."""
        ...


def workers(config: Executor | None) -> AbstractContextManager[Workers]:
    """Of the recipe's executor; null: this machine's cores."""
    match config:
        case None | LocalExecutor():
            return pool.workers(config or LocalExecutor(type="local"))
        case SlurmExecutor():
            return nullcontext(Slurm(config))
        case RayExecutor():
            return on_ray.workers(config)


def run(units: Sequence[Unit], at_work: Workers) -> int:
    """Do all units that are not finished; the number of those. Raises `DataError` that names the unit that failed."""
    if not units:
        return 0
    stage = units[0].stage
    records.sweep(stage)
    todo = [unit for unit in units if records.finished(unit) is None]
    if todo:
        for unit in progress.parts(at_work.do(todo), len(todo), stage.name):
            if records.recorded(unit) is None:
                raise DataError(
                    f"stage {unit}: its worker said that all went well, but left no record. Nothing follows on it: "
                    f"run the same command again."
                )
    return len(todo)
