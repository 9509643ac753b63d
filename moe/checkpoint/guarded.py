"""What a guard knows <-> tensors of a checkpoint; which checkpoint a run can be rolled back to."""

from pathlib import Path

import torch
from torch import Tensor

from moe.checkpoint import folder as folders
from moe.checkpoint.folder import Manifest
from moe.checkpoint.tensors import Reader
from moe.guard import Guard

_COUNTS, _LOSSES, _NORMS = "guard_counts", "guard_losses", "guard_norms"


def tensors(guard: Guard) -> dict[str, Tensor]:
    """int64 [3] and float64 [N], by key; nothing of a guard that has seen nothing."""
    if guard == Guard():
        return {}
    return {
        _COUNTS: torch.tensor([guard.skipped, guard.in_a_row, guard.roll_backs]),
        _LOSSES: torch.tensor(guard.losses, dtype=torch.float64),
        _NORMS: torch.tensor(guard.norms, dtype=torch.float64),
    }


def read(folder: Path, manifest: Manifest) -> Guard:
    """The guard of a checkpoint; a fresh one if it was written without."""
    if _COUNTS not in manifest.tensors:
        return Guard()
    with Reader(folder, manifest) as reader:
        counts, losses, norms = (reader.get(key).tolist() for key in (_COUNTS, _LOSSES, _NORMS))
    return Guard(tuple(losses), tuple(norms), *counts)


def last_good(run_folder: Path, step: int) -> int | None:
    """The newest checkpoint before or at `step` that was not written in the midst of skipped steps."""
    for candidate in reversed(folders.steps(run_folder)):
        folder = folders.step_folder(run_folder, candidate)
        if candidate <= step and not read(folder, folders.read_manifest(folder)).in_a_row:
            return candidate
    return None
