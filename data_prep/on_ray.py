"""Units of a stage -> tasks of Ray, here or on a running cluster; any failure ends the whole and names the unit.

Ray decides when and where. Nothing is tried again behind our back: what a task says is its end, and its record counts.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import records, task
from data_prep.records import Unit
from data_prep.treatment import RayExecutor
from moe import log
from moe.errors import DataError, LaunchError, TurnoutError

_STORE_BYTES = 100_000_000
"""For objects that tasks pass on, of which there are none; Ray refuses less than 75 MB, and takes 30 % by itself."""


@contextmanager
def workers(config: RayExecutor) -> Iterator["Ray"]:
    """Tasks of Ray; a cluster of this machine alone is started when there is work, and ended with the block."""
    at_work = Ray(config)
    try:
        yield at_work
    finally:
        at_work.close()


@dataclass
class Ray:
    """A connection to Ray, made when it is needed."""

    config: RayExecutor
    _ray: Any = None

    def do(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """As `executors.Workers`. Raises `DataError` and `LaunchError`."""
        ray = self._open()
        remote = ray.remote(_do).options(num_cpus=self.config.cpus, max_retries=0, retry_exceptions=False)
        here = str(Path.cwd())
        tasks = {remote.remote(unit, self.config.part_minutes, here): unit for unit in units}
        waiting = list(tasks)
        try:
            while waiting:
                ended, waiting = ray.wait(waiting, num_returns=1)
                for one in ended:
                    _check(ray, one, tasks[one])
                    yield tasks[one]
        except BaseException:
            self.close()  # which ends the tasks that still work; what they leave is swept only then
            records.sweep(units[0].stage)
            raise

    def close(self) -> None:
        """End the tasks, and the cluster if it was started here."""
        if self._ray is not None:
            self._ray.shutdown()
            self._ray = None

    def _open(self) -> Any:
        if self._ray is None:
            ray = _ray()
            _start(ray, self.config)
            self._ray = ray
            _check_room(ray, self.config.cpus)
        return self._ray

    def plan(self, units: Sequence[Unit]) -> str:
        """As `executors.Workers`."""
        where = "a cluster of this machine" if self.config.address is None else self.config.address
        return f"{len(units)} tasks of Ray on {where}, {self.config.cpus} cores each"


def _do(unit: Unit, minutes: float | None, folder: str) -> None:
    """In a worker: relative paths of a recipe are from the folder of the command."""
    os.chdir(folder)
    log.setup()
    task.do(unit, minutes)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise LaunchError(
            "executor.type is ray, but Ray is not installed: pip install 'turnout[ray]', or use executor.type=local."
        ) from None
    return ray


def _start(ray: Any, config: RayExecutor) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    mine: dict[str, Any] = {"num_cpus": config.workers, "object_store_memory": _STORE_BYTES}
    try:
        ray.init(
            address=config.address or "local",
            include_dashboard=None if config.address else False,
            logging_level="warning",
            **({} if config.address else mine),
        )
    except Exception as error:  # Ray raises whatever it met with
        raise LaunchError(
            f"Ray did not start, or does not answer at {config.address or 'this machine'}: "
            f"{type(error).__name__}: {error}. Mend executor.address, or use executor.type=local."
        ) from None


def _check_room(ray: Any, cpus: int) -> None:
    """Raises `LaunchError` for tasks that no node could ever begin: Ray would let them wait."""
    most = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if most < cpus:
        raise LaunchError(
            f"executor.cpus is {cpus}, but no node of Ray has more than {most:.0f} cores: no task could ever begin. "
            f"Use executor.cpus={max(1, int(most))} or less."
        )


def _check(ray: Any, one: Any, unit: Unit) -> None:
    """Raises `DataError` if a task did not end well."""
    try:
        ray.get(one)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, TurnoutError):
            raise DataError(str(cause)) from None
        raise DataError(f"stage {unit}: {type(cause).__name__}: {cause}. What is finished stays.") from None
    except ray.exceptions.RayError as error:
        if late := task.late(unit.stage):
            log.get().error("%s", task.stacks(unit.stage))
            raise DataError(task.too_long(unit.stage.name, late)) from None
        said = " ".join(str(error).split())[:500]
        raise DataError(
            f"stage {unit}: its worker of Ray was killed ({type(error).__name__}: {said}). Nothing follows on this "
            f"stage; what is finished stays: run the same command again when the cause is gone."
        ) from None
