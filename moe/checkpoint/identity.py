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
    "train.guard",
    "parallel",
    "checkpoint",
    "logging",
    "deepspeed",
)
"""What may differ between a run and its continuation: how it is computed, not what, and what it is guarded against,
so that a run that stopped for a bad step may go on without it. A micro-batch's size is part of what is trained where a
capacity, a loss or the experts' own choice counts within it."""


def check(run: RunConfig, data_fingerprint: str) -> Manifest | None:
    """The newest checkpoint's manifest, if there is one and `run` continues it; touches no tensors.

    Raises `CheckpointError` if the folder holds other training, or training on other data.
    """
    found = folders.steps(run.folder)
    if not found:
        started = run.folder / "recipe.yaml"
        if started.is_file():
            compare(load(RunConfig, started), run)
        return None
    folder = folders.step_folder(run.folder, found[-1])
    manifest = folders.read_manifest(folder)
    folders.verify(folder, manifest, {"recipe.yaml"})
    compare(load(RunConfig, folder / "recipe.yaml"), run)
    if manifest.data_fingerprint != data_fingerprint:
        raise CheckpointError(
            f"{folder} was trained on other data than {run.data.path} holds now (fingerprint "
            f"{manifest.data_fingerprint}, now {data_fingerprint}): the position would mean other samples. "
            f"Prepare the data as it was, or choose another run_dir."
        )
    if manifest.next_sample != (expected := manifest.step * run.train.global_batch_size):
        raise CheckpointError(
            f"{folder} says that sample {manifest.next_sample} comes next, but after {manifest.step} steps of "
            f"{run.train.global_batch_size} sequences it is sample {expected}: samples would be left out or seen "
            f"twice. Go on with the version of turnout that wrote it, or choose another run_dir."
        )
    if manifest.step > run.train.steps:
        raise CheckpointError(
            f"{folder} is at step {manifest.step}, but train.steps is {run.train.steps}: there is nothing to go on "
            f"with. Raise train.steps, or choose another run_dir."
        )
    return manifest


def compare(saved: RunConfig, run: RunConfig) -> None:
    """Raise `CheckpointError` unless the two differ at most in how they are computed."""
    differences = _differences(saved, run)
    if differences:
        raise CheckpointError(
            f"{run.folder} holds a run with other settings:\n       "
            + "\n       ".join(differences)
            + "\n       A run goes on with the training it began. Restore the settings, choose another run_dir, or "
            "remove the folder."
        )


def counts_by_micro_batch(run: RunConfig) -> bool:
    """Whether a micro-batch's size is part of what is trained."""
    balance, moe = run.balance, run.model.moe
    by_micro_batch = balance.capacity_factor is not None or balance.micro_batch_loss_weight > 0
    return by_micro_batch or (moe is not None and moe.router_choice != "token")


def _differences(saved: RunConfig, now: RunConfig) -> list[str]:
    before, after = flat(saved.model_dump()), flat(now.model_dump())
    fixed = counts_by_micro_batch(now)
    free_keys = [key for key in LAYOUT if not (fixed and key == "train.micro_batch_size")]
    return [
        f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in free_keys)
    ]


def flat(page: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested blocks -> one, under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in page.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
