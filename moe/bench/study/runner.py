"""A job -> its run's folder, trained and evaluated by the ordinary verbs, each in a process of its own."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe import log, train
from moe.bench.study.outcome import EVALUATION, Outcome
from moe.bench.study.plan import Job, Jobs
from moe.config import RunConfig
from moe.errors import EXIT_STOPPED, CheckpointError, LaunchError
from moe.recipe import load

_LOOK_EVERY = 0.5
"""Seconds between looks at a run's records."""


class Runner:
    """Executes jobs one after another, with a progress bar on a terminal and a sentence a run elsewhere."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._logs = jobs.plan.folder / "logs"
        columns = (BarColumn(bar_width=12), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(
            *columns,
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._runs = self._progress.add_task("runs", total=jobs.number())
        self._steps = self._progress.add_task("steps")

    def __enter__(self) -> "Runner":
        self._logs.mkdir(parents=True, exist_ok=True)
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def prepare(self) -> None:
        """Make the data, unless it is there or the plan says that it is."""
        if (recipe := self._jobs.path_of_data()) is not None:
            self._turnout(self._logs / "prepare.log", "prepare", str(recipe))

    def execute(self, job: Job) -> Outcome:
        """Train and evaluate, or read what an earlier study did.

        Raises `CheckpointError` if the folder holds other training, `LaunchError` if a verb fails.
        """
        _check_folder(job)
        outcome, again = Outcome.read(job), True
        if outcome is None:
            outcome, again = self._make(job), False
        self._progress.update(self._runs, advance=1)
        said = "was there" if again else "done"
        log.get().info("%s %s: held-out loss %.4f nats/token", job.label, said, outcome.loss)
        return outcome

    def _make(self, job: Job) -> Outcome:
        path, steps = self._logs / f"{job.label}.log", job.run.train.steps
        metrics = job.run.folder / "metrics.jsonl"
        self._progress.update(self._steps, description=job.label, total=steps, completed=_last_step(metrics))
        self._turnout(
            path,
            "train",
            str(job.recipe),
            *job.overrides,
            look=lambda: self._progress.update(self._steps, completed=_last_step(metrics)),
        )
        self._turnout(path, "evaluate", str(job.run.folder), "--json", str(job.run.folder / EVALUATION))
        outcome = Outcome.read(job)
        assert outcome is not None, "both verbs ended well"
        return outcome

    def _turnout(self, path: Path, *arguments: str, look: Callable[[], None] = lambda: None) -> None:
        """Run a verb, its words to the end of `path`."""
        said = shlex.join(["turnout", *arguments])
        with path.open("a", encoding="utf-8") as words:
            words.write(f"$ {said}\n")
            words.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "moe.cli", *arguments], stdout=words, stderr=subprocess.STDOUT
            )
            try:
                while process.poll() is None:
                    look()
                    time.sleep(_LOOK_EVERY)
            except KeyboardInterrupt:  # Ctrl-C reached the child too; it saves and ends
                process.wait()
                raise
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if process.returncode == EXIT_STOPPED:
            raise LaunchError(
                f"`{said}` was stopped by a signal and has saved. The same command goes on from there."
            )
        if process.returncode:
            raise LaunchError(
                f"`{said}` ended with code {process.returncode}; {path} says why. Mend it: the same command goes on."
            )


def _check_folder(job: Job) -> None:
    """Stricter than `turnout train`, which goes on with a run whose number of steps has changed."""
    train.preflight(job.run, 1)
    recipe = job.run.folder / "recipe.yaml"
    if recipe.is_file() and load(RunConfig, recipe) != job.run:
        raise CheckpointError(
            f"{job.run.folder} holds a run of another recipe, which would be compared with runs of this one. "
            f"Remove that folder, or choose another study_dir."
        )


def _last_step(metrics: Path) -> int:
    """The newest step in a file that may be growing, or not be there."""
    try:
        with metrics.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - (1 << 16)))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, KeyError):
        return 0
