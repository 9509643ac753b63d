"""checkpoints/step_N -> a running engine, once every file is known to be what was written."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moe.checkpoint import folder as folders
from moe.checkpoint import guarded
from moe.checkpoint import state as states
from moe.checkpoint.folder import Manifest
from moe.checkpoint.identity import check
from moe.checkpoint.save import TrainState
from moe.dist import Ranks
from moe.engine.engine import Engine
from moe.errors import CheckpointError


def restore(engine: Engine, data_fingerprint: str) -> TrainState:
    """Load the newest checkpoint of the run's folder into the engine, if there is one. Collective.

    Any world size, expert-parallel size and ZeRO stage can read it. Raises `CheckpointError` if a file was
    changed or cut, a tensor is missing, or the data is not what the run was trained on.
    """
    manifest = check(engine.run, data_fingerprint)
    if manifest is None:
        return TrainState()
    return load(engine, manifest)


def load(engine: Engine, manifest: Manifest) -> TrainState:
    """The checkpoint of that manifest -> the engine. Collective; raises `CheckpointError` as `restore` does."""
    folder = folders.step_folder(engine.run.folder, manifest.step)
    _verify_together(engine.ranks, folder, manifest)
    guard = guarded.read(folder, manifest)
    states.prepare(engine, manifest.step - guard.skipped)
    with _Tensors(folder, manifest) as tensors:
        for parameter, state, keys in states.needed(engine):
            parts = [tensors.get(key) for key in keys]
            value = parts[0] if parts[0].shape == parameter.shape else torch.stack(parts)
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{folder}: {keys[0]} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}."
                )
            states.write(engine, parameter, state, value)
        for name, buffer in engine.model.named_buffers():
            buffer.copy_(tensors.get(states.key(states.WEIGHT, name)))
        unused = None
        if states.STEPS_SINCE_USE in manifest.tensors:
            unused = tensors.get(states.STEPS_SINCE_USE).to(engine.ranks.device)
    _restore_rng(engine.ranks, folder, manifest)
    engine.ranks.barrier()
    return TrainState(manifest.step, manifest.tokens, unused, guard)


def _verify_together(ranks: Ranks, folder: Path, manifest: Manifest) -> None:
    """Each rank hashes its share of the files; all learn of a fault, so that none is left waiting."""
    mine = {name for turn, name in enumerate(sorted(manifest.files)) if turn % ranks.world_size == ranks.rank}
    fault = ""
    try:
        folders.verify(folder, manifest, mine)
    except CheckpointError as error:
        fault = str(error)
    faults = [found for found in ranks.gather(fault) if found]
    if faults:
        raise CheckpointError(faults[0])


class _Tensors:
    """Tensors of a checkpoint by key, each file opened once."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.files: dict[str, Any] = {}

    def __enter__(self) -> "_Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        self.files.clear()

    def get(self, key: str) -> torch.Tensor:
        name = self.manifest.tensors.get(key)
        if name is None:
            raise CheckpointError(f"{self.folder} has no tensor {key}: it was written by another model.")
        if name not in self.files:
            self.files[name] = safe_open(self.folder / name, framework="pt")
        tensor: torch.Tensor = self.files[name].get_tensor(key)
        return tensor


def _restore_rng(ranks: Ranks, folder: Path, manifest: Manifest) -> None:
    if manifest.world_size != ranks.world_size:
        return  # nothing in training draws from it; another number of ranks has other streams
    with safe_open(folder / f"rng-{ranks.rank:05d}.safetensors", framework="pt") as file:
        torch.set_rng_state(file.get_tensor("cpu"))
        if "cuda" in file.keys() and torch.cuda.is_available():  # noqa: SIM118  not a mapping
            torch.cuda.set_rng_state(file.get_tensor("cuda"))
