"""Records of a run -> metrics.jsonl, the screen, TensorBoard. Rank 0 alone writes and speaks."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe import log
from moe.attempt import check_owner
from moe.config import RunConfig
from moe.errors import ConfigError, TrainingError

Record = Mapping[str, Any]
LARGEST_DIFFERENCE = 1e-4
"""Of a step's loss, relative, between two layouts."""


class Tracker:
    """Where a run's records go. Make one with `open`."""

    def __init__(
        self, run: RunConfig, step: int, progress: Progress | None, board: Any, before: Record | None = None
    ) -> None:
        self._path = run.folder / "metrics.jsonl"
        self._progress = progress
        self._task = None
        if progress is not None:
            self._task = progress.add_task("", total=run.train.steps, completed=step, status="starting")
        self._board = board
        self._before = before
        self._steps = run.train.steps

    @classmethod
    @contextmanager
    def open(cls, run: RunConfig, *, speaks: bool, step: int) -> Iterator["Tracker | None"]:
        """A tracker for a run that stands at `step`; None on ranks that do not speak.

        Records of later steps, left by a run that was killed after its last checkpoint, are dropped: those
        steps will be taken again, and the loss of the first is compared with the one dropped. Raises
        `ConfigError` if TensorBoard is asked for and not installed.
        """
        if not speaks:
            yield None
            return
        check_owner(run.folder)
        before = _drop_after(run.folder / "metrics.jsonl", step)
        board = _tensorboard(run) if run.logging.tensorboard else None
        console = Console(stderr=True)
        if not console.is_terminal:
            with _on_record(cls(run, step, None, board, before)) as tracker:
                yield tracker
        else:
            # 80 columns hold all of it.
            columns = (MofNCompleteColumn(), BarColumn(bar_width=8), TimeRemainingColumn())
            with (
                Progress(*columns, TextColumn("{task.fields[status]}"), console=console) as progress,
                _on_record(cls(run, step, progress, board, before)) as tracker,
            ):
                yield tracker
        if board is not None:
            board.finish()

    def log(self, record: Record) -> None:
        """A training record (moe.train says what is in it)."""
        self._append(record)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=record["step"], status=_status(record))
        else:
            left = (self._steps - record["step"]) * record["seconds"]
            what = _sentence(record)
            log.get().info("step %d/%d  %s  ETA %s", record["step"], self._steps, what, _duration(left))
        if self._before is not None and record["step"] == self._before["step"]:
            _compare(self._before["loss"], record)
            self._before = None

    def evaluation(self, record: Record) -> None:
        """A record of the held-out loss."""
        self._append(record)
        log.get().info(
            "step %d  held-out loss %.4f nats/token, %.4f bits/byte",
            record["step"],
            record["validation_loss"],
            record["bits_per_byte"],
        )

    def checkpoint(self, record: Record) -> None:
        """A record of a save that is complete."""
        self._append(record)
        log.get().info(
            "saved step %d: %.1f MB; training was held for %.3f s, writing took %.3f s",
            record["step"],
            record["checkpoint_bytes"] / 1e6,
            record["checkpoint_held_seconds"],
            record["checkpoint_write_seconds"],
        )

    def skipped(self, record: Record) -> None:
        """A record of a step that changed nothing."""
        self._append(record)
        log.get().warning(
            "step %d is skipped: %s; %d in a row, %d in all",
            record["step"],
            record["skipped"],
            record["skipped_in_a_row"],
            record["skipped_steps"],
        )

    def rolled_back(self, record: Record) -> None:
        """A record of a roll-back. Records of what it undid are dropped; of skipped steps they stay."""
        _drop_after(self._path, record["rolled_back_to"], but="skipped")
        self._append(record)
        log.get().warning(
            "step %d: rolled back to checkpoint step_%d (roll-back %d); on with the batches of step %d, %d steps "
            "skipped in all",
            record["step"],
            record["rolled_back_to"],
            record["roll_backs"],
            record["step"] + 1,
            record["skipped_steps"],
        )

    def stopped(self, error: TrainingError) -> None:
        """A record of the error that ends the training."""
        self._append({"step": error.step, "stopped": str(error)})

    def _append(self, record: Record) -> None:
        check_owner(self._path.parent)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._board is not None:
            self._board.log(_scalars(record), step=record["step"])


@contextmanager
def _on_record(tracker: Tracker) -> Iterator[Tracker]:
    try:
        yield tracker
    except TrainingError as error:
        tracker.stopped(error)
        raise


def _scalars(record: Record) -> dict[str, float]:
    """What TensorBoard shows; it groups by what stands before the slash."""
    scalars = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
    for name, values in record.get("per_layer", {}).items():
        scalars |= {f"{name}/layer_{layer}": value for layer, value in enumerate(values)}
    return scalars


def _status(record: Record) -> str:
    """The same in little room."""
    speed, share = record["tokens_per_second"], 100 * record["mfu"]
    balance = f"  max violation {record['max_violation']:.1f}" if "max_violation" in record else ""
    return f"loss {record['loss']:.3f}  {speed:,.0f} tokens/s  MFU {share:.0f} %{balance}"


def _sentence(record: Record) -> str:
    parts = [
        f"loss {record['loss']:.4f}",
        f"grad norm {record['grad_norm']:.3f}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"MFU {100 * record['mfu']:.1f} %",
        f"data wait {100 * record['data_wait']:.1f} %",
    ]
    if "max_violation" in record:
        parts.append(f"max violation {record['max_violation']:.2f}")
    if "dropped" in record:
        parts.append(f"dropped {100 * record['dropped']:.1f} %")
    if record.get("dead_experts"):
        parts.append(f"dead experts {record['dead_experts']}")
    return "  ".join(parts)


def _compare(before: float, record: Record) -> None:
    """The loss of a step is that of the weights that were saved: the same in every layout, but for rounding."""
    difference = abs(record["loss"] - before) / max(abs(before), 1e-12)
    say, rest = log.get().info, ""
    if not difference <= LARGEST_DIFFERENCE:
        say, rest = (
            log.get().warning,
            f": above {LARGEST_DIFFERENCE:.0e}, so look at what has changed",
        )
    what = "step %d was taken before: its loss was %.6f and is %.6f, relative difference %.1e%s"
    say(what, record["step"], before, record["loss"], difference, rest)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:d}:{seconds:02d}"


def _drop_after(path: Path, step: int, but: str | None = None) -> Record | None:
    """Drop records of later steps, but those that have the key `but`.

    Returns that of the training step that comes next, if there was one.
    """
    if not path.is_file():
        return None
    if step == 0:
        path.unlink()  # the run begins anew
        return None
    kept, before = [], None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut by a kill
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        if record["step"] <= step or but in record:
            kept.append(line + "\n")
        elif record["step"] == step + 1 and isinstance(record.get("loss"), float):
            before = record
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)  # noqa: PTH105  atomic, also over an existing file
    return before


def _tensorboard(run: RunConfig) -> Any:
    from accelerate.tracking import TensorBoardTracker
    from accelerate.utils import is_tensorboard_available

    if not is_tensorboard_available():
        raise ConfigError(
            "logging.tensorboard is true, but tensorboard is not installed. "
            "Install it with pip install 'turnout[tensorboard]', or set logging.tensorboard=false."
        )
    board = TensorBoardTracker(run.name, logging_dir=run.folder / "logs" / "tensorboard")
    board.start() if hasattr(board, "start") else None
    return board
