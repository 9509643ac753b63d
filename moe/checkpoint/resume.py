"""checkpoints/step_N -> a running engine, once every file is known to be what was written."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from moe.checkpoint import folder as folders
from moe.checkpoint import guarded
from moe.checkpoint import state as states
from moe.checkpoint.folder import Manifest
from moe.checkpoint.identity import check
from moe.checkpoint.proof import prove
from moe.checkpoint.save import TrainState
from moe.checkpoint.tensors import Reader
from moe.dist import Ranks
from moe.engine.engine import Engine
from moe.engine.partition import publish
from moe.errors import CheckpointError


def restore(engine: Engine, data_fingerprint: str) -> TrainState:
    """Load the newest checkpoint of the run's folder into the engine, if there is one. Collective.

    Any world size, expert-parallel size and ZeRO stage can read it; in another layout than the one that wrote it
    the engine's state is read back and compared. Raises `CheckpointError` if a file was changed or cut, a tensor
    is missing or differs, or the data is not what the run was trained on.
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
    with Reader(folder, manifest) as tensors:
        for parameter, state, keys in states.needed(engine):
            parts = [tensors.get(key) for key in keys]
            shape = engine.homes[parameter].shape
            value = parts[0] if parts[0].shape == shape else torch.stack(parts)
            if value.shape != shape:
                raise CheckpointError(
                    f"{folder}: {keys[0]} has shape {tuple(value.shape)}, not {tuple(shape)}."
                )
            states.write(engine, parameter, state, value)
        publish(engine.wrapped.optimizer)
        for name, buffer in engine.model.named_buffers():
            buffer.copy_(tensors.get(states.key(states.WEIGHT, name)))
        unused = None
        if states.STEPS_SINCE_USE in manifest.tensors:
            unused = tensors.get(states.STEPS_SINCE_USE).to(engine.ranks.device)
    _restore_rng(engine.ranks, folder, manifest)
    prove(engine, manifest)
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


def _restore_rng(ranks: Ranks, folder: Path, manifest: Manifest) -> None:
    name = f"rng-{ranks.rank:05d}.safetensors"
    if manifest.layout.world_size != ranks.world_size or name not in manifest.files:
        return  # nothing in training draws from it; another number of ranks has other streams
    states_ = load_file(folder / name)
    torch.set_rng_state(states_["cpu"])
    if "cuda" in states_ and torch.cuda.is_available():
        torch.cuda.set_rng_state(states_["cuda"])
