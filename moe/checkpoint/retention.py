"""Which checkpoints go, and how they go: a kill in between leaves no half of one."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from moe.checkpoint import folder as folders


def surplus(steps: Sequence[int], keep: int, keep_every: int | None = None) -> list[int]:
    """Of ascending `steps` those that are neither among the newest `keep` (at least 1) nor milestones."""
    assert keep >= 1
    return [step for step in steps[:-keep] if keep_every is None or step % keep_every]


def remove(run_folder: Path, steps: Iterable[int]) -> None:
    """Take each checkpoint's name before its files: what has the name is whole at every moment."""
    for step in steps:
        folder = folders.step_folder(run_folder, step)
        torn = folders.torn(folder)
        shutil.rmtree(torn, ignore_errors=True)
        folder.rename(torn)
        shutil.rmtree(torn)


def leftovers(home: Path) -> list[Path]:
    """What killed saves, removals and resizes left in `home`, the folder of checkpoints."""
    replaced = [path for path in home.glob(f"{folders.BEFORE}step_*") if _has_heir(path)]
    return sorted([*home.glob(f"{folders.TORN}*"), *replaced])


def sweep(home: Path) -> None:
    """Remove leftovers; nothing may be saving there."""
    for left in leftovers(home):
        shutil.rmtree(left)


def _has_heir(replaced: Path) -> bool:
    return replaced.with_name(replaced.name.removeprefix(folders.BEFORE)).is_dir()
