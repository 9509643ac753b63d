"""Whether a recipe goes on with the training that a run's folder holds; needs no engine."""

from typing import Any

from moe.checkpoint import folder as folders
from moe.checkpoint.folder import Manifest
from moe.config import RunConfig
from moe.errors import CheckpointError
from moe.recipe import load

LAYOUT = (
    "name",
    "run_dir",
    "data.path",
    "data.verify_hashes",
    "train.steps",
    "train.micro_batch_size",
    "train.activation_recomputation",
    "train.evaluate_every",
    "parallel",
    "checkpoint",
    "logging",
    "deepspeed",
)
"""What may differ between a run and its continuation: how it is computed, not what."""


def check(run: RunConfig) -> Manifest | None:
    """The newest checkpoint's manifest, if there is one and `run` continues it; touches no tensors.

    Raises `CheckpointError` if the recipe in the run folder trains something else.
    """
    found = folders.steps(run.folder)
    if not found:
        return None
    folder = folders.step_folder(run.folder, found[-1])
    manifest = folders.read_manifest(folder)
    folders.verify(folder, manifest, {"recipe.yaml"})
    differences = _differences(load(RunConfig, folder / "recipe.yaml"), run)
    if differences:
        raise CheckpointError(
            f"{run.folder} holds a run with other settings:\n       "
            + "\n       ".join(differences)
            + "\n       A run goes on with the training it began. Restore the settings, or choose another run_dir."
        )
    if manifest.step > run.train.steps:
        raise CheckpointError(
            f"{folder} is at step {manifest.step}, but train.steps is {run.train.steps}: there is nothing to go on "
            f"with. Raise train.steps, or choose another run_dir."
        )
    return manifest


def _differences(saved: RunConfig, now: RunConfig) -> list[str]:
    before, after = _flat(saved.model_dump()), _flat(now.model_dump())
    return [
        f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in LAYOUT)
    ]


def _flat(page: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in page.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
