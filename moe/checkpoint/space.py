"""A recipe -> the room that its checkpoints take, checked before training starts."""

import shutil

from moe.checkpoint import folder as folders
from moe.checkpoint.folder import Manifest
from moe.config import RunConfig
from moe.errors import CheckpointError
from moe.model import count
from moe.model.lora import trained

_FLOAT32 = 4


def num_bytes(run: RunConfig) -> int:
    """About what one checkpoint takes: every weight and what the optimizer remembers of it, in float32."""
    weights = count(run.model, run.data.sequence_length).total_parameters
    if (
        run.lora is not None
    ):  # nothing is remembered of frozen ones; small adapters are Muon's or AdamW's alike
        return _FLOAT32 * (weights + 3 * sum(trained(run.model, run.lora).values()))
    if run.train.optimizer.kind == "adamw":
        return _FLOAT32 * 3 * weights
    # Muon remembers one thing of a matrix; embedding and head are AdamW's, and vectors are small.
    by_adamw = run.model.vocab_size * run.model.hidden_size * (1 if run.model.tie_embeddings else 2)
    return _FLOAT32 * (2 * weights + by_adamw)


def check(run: RunConfig, newest: Manifest | None, free: int | None = None) -> None:
    """Whether what training will save finds room beside what is there; `free` bytes, or as the system says.

    Raises `CheckpointError` if the checkpoints to be held at once do not fit: all that `checkpoint.keep` holds and
    the one being written, or the next one where all are kept.
    """
    step = newest.step if newest else 0
    at_once = _at_once(run, step)
    size = num_bytes(run) if newest is None else newest.num_bytes
    free = _free(run) if free is None else free
    if at_once * size > free:
        held = "the next one" if at_once == 1 else f"{at_once} more of them at once"
        way_out = "" if at_once == 1 else "set a smaller checkpoint.keep, "
        raise CheckpointError(
            f"{run.folder}: a checkpoint takes {_short(size)}, and there must be room for {held}, "
            f"{_short(at_once * size)}, but {_short(free)} are free there. "
            f"Make room, {way_out}or choose another run_dir."
        )


def caution(run: RunConfig, step: int, free: int | None = None) -> str | None:
    """A sentence if the checkpoints after `step` will not fit by the end of the run, none being moved away."""
    coming, size = _coming(run, step), num_bytes(run)
    most = (
        coming if run.checkpoint.keep is None else min(coming, _at_once(run, step) + _milestones(run, step))
    )
    free = _free(run) if free is None else free
    if most * size <= free:
        return None
    return (
        f"by its end this run adds {most} checkpoints of {_short(size)} to {run.folder}, where {_short(free)} are "
        f"free: set checkpoint.keep, or move them away as they come"
    )


def _at_once(run: RunConfig, step: int) -> int:
    """Most checkpoints that there will be beyond those of now, milestones aside."""
    coming, keep = _coming(run, step), run.checkpoint.keep
    fewest = min(coming, 1)
    return fewest if keep is None else max(fewest, min(coming, keep + 1 - len(folders.steps(run.folder))))


def _coming(run: RunConfig, step: int) -> int:
    """How many saves there will be after `step`, the last step's among them."""
    every, last = run.checkpoint.every_steps, run.train.steps
    if step >= last:
        return 0
    return 1 + ((last - 1) // every - step // every if every else 0)


def _milestones(run: RunConfig, step: int) -> int:
    every = run.checkpoint.keep_every
    return run.train.steps // every - step // every if every else 0


def _free(run: RunConfig) -> int:
    """Bytes, where the run's folder is or will be."""
    folder = run.folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _short(size: int) -> str:
    """Bytes for people, in decimal units."""
    value, units = float(size), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
