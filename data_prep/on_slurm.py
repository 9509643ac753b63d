"""Units of a stage -> an array job of Slurm; watched until each has left its record, or one has failed.

Slurm decides when and where; we submit one array a stage, whatever the number of units, so that none can be lost
between two jobs. What Slurm says is believed if it is bad, and never if it is good: then the record counts.

WORK/slurm/STAGE.*/   job.sbatch, NNNN.units (what each task of the array is to do), NNNN.log (what it said)
WORK/slurm/job        number of the job in the queue, so that what a killed command left is cancelled by the next
"""

import os
import pickle
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep import records, task
from data_prep.records import Unit
from data_prep.treatment import SlurmExecutor
from moe import log, slurm
from moe.errors import DataError, LaunchError

_SECONDS = 2.0
_LARGEST = 1001
_DOUBT_SECONDS = 30.0
"""How long a record may take to be seen here after its task has ended: NFS may say so long that it is not there."""
_NEVER_SECONDS = 10.0
"""How long a reason to wait for ever may take to go away."""
_SILENCE_SECONDS = 300.0
_END_SECONDS = 45.0
_ALIVE = frozenset(
    {"COMPLETING", "CONFIGURING", "PENDING", "REQUEUED", "REQUEUE_FED", "RESIZING", "RUNNING", "SIGNALING"}
    | {"STAGE_OUT", "STOPPED", "SUSPENDED"}
)
_ENDED = frozenset({"COMPLETED", "gone"})
_NEVER = (
    "AccountNotAllowed", "BadConstraints", "DependencyNeverSatisfied", "InvalidAccount", "InvalidQOS", "JobHeldAdmin",
    "JobHeldUser", "PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit", "QOSNotAllowed",
    "launch_failed_requeued_held",
)  # fmt: skip
"""Reasons for which a task waits until a person does something."""


@dataclass(frozen=True)
class State:
    """What Slurm says of a task of an array."""

    name: str
    reason: str = ""
    node: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether it has failed, or will never begin."""
        if self.name in _ALIVE:
            return self.name == "PENDING" and self.reason.startswith(_NEVER)
        return self.name not in _ENDED

    def __str__(self) -> str:
        where = f" on {self.node}" if self.node else ""
        return f"{self.name}{f' ({self.reason})' if self.reason not in ('', 'None') else ''}{where}"


@dataclass(frozen=True)
class Slurm:
    """An array job a stage."""

    config: SlurmExecutor

    def do(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """As `executors.Workers`. Raises `DataError` and `LaunchError`."""
        home = units[0].stage.parent / "slurm"
        home.mkdir(exist_ok=True)
        _cancel(home / "job")
        folder = Path(tempfile.mkdtemp(prefix=f"{units[0].stage.name}.", dir=home))
        shares = _shares(units, self._most(_largest_array()))
        for number, share in enumerate(shares):
            _units(folder, number).write_bytes(pickle.dumps((share, self.config.part_minutes)))
        page = folder / "job.sbatch"
        page.write_text(self._script(folder, units[0].stage.name, len(shares)), encoding="utf-8")
        job = slurm.submit(str(page))
        (folder / "job").write_text(job, encoding="ascii")
        (folder / "job").rename(home / "job")
        log.get().info(
            "%s: job %s of %d tasks is submitted; logs are in %s",
            units[0].stage.name,
            job,
            len(shares),
            folder,
        )
        try:
            yield from _as_they_end(job, folder, shares)
        finally:
            _cancel(home / "job")
            records.sweep(units[0].stage)

    def plan(self, units: Sequence[Unit]) -> str:
        """The script."""
        stage = units[0].stage
        shares = _shares(units, self._most(_LARGEST))
        return self._script(stage.parent / "slurm" / f"{stage.name}.XXXX", stage.name, len(shares))

    def _most(self, cluster: int) -> int:
        return min(self.config.workers or cluster, cluster)

    def _script(self, folder: Path, stage: str, count: int) -> str:
        config = self.config
        options = {
            "job-name": f"turnout-{stage}",
            "array": f"0-{count - 1}",
            "ntasks": 1,
            "cpus-per-task": config.cpus,
            "mem": config.memory_gigabytes and f"{config.memory_gigabytes}G",
            "partition": config.partition,
            "time": config.task_minutes,
            "account": config.account,
            "qos": config.qos,
            "output": f"{str(folder).replace('%', '%%')}/%a.log",
            "open-mode": "append",
        }
        exports = {"OMP_NUM_THREADS": str(config.cpus)} | {
            name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ
        }
        return slurm.script(
            options,
            [
                "#SBATCH --requeue",
                "# Written by `turnout prepare`, which submits it and watches. Slurm may begin a task anew on another",
                "# node: a part that is done stays done.",
                "set -euo pipefail",
                f"cd {shlex.quote(str(Path.cwd()))}",
                *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
                f"exec {shlex.join([sys.executable, '-u', '-m', 'data_prep.task', str(folder)])}",
            ],
        )


def load(folder: Path, number: int) -> tuple[list[Unit], float | None]:
    """What task `number` of an array is to do, and the minutes that each unit may take."""
    share: tuple[list[Unit], float | None] = pickle.loads(  # noqa: S301  written by us, in our own folder
        _units(folder, number).read_bytes()
    )
    return share


def _units(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.units"


def _shares(units: Sequence[Unit], most: int) -> list[list[Unit]]:
    """The units of each task; consecutive ones go to different tasks."""
    count = min(len(units), most)
    return [list(units[number::count]) for number in range(count)]


def _largest_array() -> int:
    """Tasks that an array of this cluster may have: their numbers are below MaxArraySize."""
    for line in slurm.ask("scontrol", "show", "config").splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize" and value.strip().isdigit():
            return max(1, int(value))
    return _LARGEST


def _as_they_end(job: str, folder: Path, shares: Sequence[list[Unit]]) -> Iterator[Unit]:
    """Raises `DataError` that names the task, its unit and its log."""
    missing = {number: list(share) for number, share in enumerate(shares)}
    doubtful: dict[int, float] = {}
    heard, pause = time.monotonic(), _SECONDS / 8
    while missing:
        try:
            states = _states(job)
            heard = time.monotonic()
        except LaunchError as silence:
            if time.monotonic() - heard > _SILENCE_SECONDS:
                raise
            log.get().warning("%s Asking again.", silence)
            time.sleep(_SECONDS)
            continue
        for number in list(missing):
            for unit in list(missing[number]):
                if records.recorded(unit) is not None:
                    missing[number].remove(unit)
                    yield unit
            if not missing[number]:
                del missing[number]
                continue
            state = states.get(number, State("gone"))
            if state.name not in _ENDED and not state.is_bad:
                doubtful.pop(number, None)
                continue
            since = doubtful.setdefault(number, time.monotonic())
            patience = {"PENDING": _NEVER_SECONDS, **dict.fromkeys(_ENDED, _DOUBT_SECONDS)}
            if time.monotonic() - since < patience.get(state.name, 0.0):
                continue
            raise _failed(job, number, state, missing[number][0], folder)
        time.sleep(pause)
        pause = min(2 * pause, _SECONDS)  # a short stage is soon over


def _states(job: str) -> Mapping[int, State]:
    """Of each task of an array, as far as Slurm remembers it; tasks that have ended are forgotten after a while."""
    try:
        said = slurm.ask(
            "squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%K|%T|%r|%N"
        )
    except LaunchError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    states = {}
    for line in said.splitlines():
        number, state, reason, node = line.strip().split("|", 3)
        if number.isdigit():
            states[int(number)] = State(state, reason, node)
    return states


def _failed(job: str, number: int, state: State, unit: Unit, folder: Path) -> DataError:
    if late := task.late(unit.stage):
        log.get().error("%s", task.stacks(unit.stage))
        return DataError(task.too_long(unit.stage.name, late))
    path = folder / f"{number}.log"
    try:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    what = (
        "has ended, but left no record of it"
        if state.name in _ENDED
        else f"will not begin: {state}"
        if state.name == "PENDING"
        else f"failed: {state}"
    )
    return DataError(
        f"stage {unit}: task {job}_{number} of Slurm {what}. Its log {path} "
        f"{f'ends with: {lines[-1][-500:]}' if lines else 'is empty.'} "
        f"The other tasks are cancelled, and nothing follows on this stage; what is finished stays: run the same "
        f"command again when the cause is gone."
    )


def _cancel(page: Path) -> None:
    """End the job that `page` names and wait until none of its tasks is left, so that no two work on one unit."""
    if not page.exists():
        return
    job = page.read_text(encoding="ascii")
    end = time.monotonic() + _END_SECONDS
    try:
        while any(state.name in _ALIVE for state in _states(job).values()):
            slurm.cancel(job)
            if time.monotonic() > end:
                raise LaunchError(
                    f"job {job} of Slurm was cancelled, but does not end within {_END_SECONDS:.0f} s."
                )
            time.sleep(0.5)
    except LaunchError as error:
        log.get().warning("%s The next run cancels job %s first.", error, job)
        return
    page.unlink()
