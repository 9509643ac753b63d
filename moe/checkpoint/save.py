"""A running engine -> checkpoints/step_N, complete or not there at all."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moe.checkpoint import certificate
from moe.checkpoint import folder as folders
from moe.checkpoint import state as states
from moe.checkpoint.folder import File, Manifest
from moe.config import RunConfig
from moe.dist import Ranks
from moe.engine.engine import Engine
from moe.errors import CheckpointError
from moe.recipe import dump
from moe.sparse.health import steps_since_use

T = TypeVar("T")


@dataclass(frozen=True)
class TrainState:
    """How far a run is; with the weights and moments all that the next step depends on."""

    step: int = 0
    """Optimizer steps taken; fixes the learning rate too."""
    tokens: int = 0
    """Tokens trained on, masked ones included."""
    steps_since_use_LE: Tensor | None = field(default=None, compare=False)
    """int64: steps that each expert of each sparse layer has gone without a token; None: none taken, or dense.
    For the records alone.
    """

    def after(self, num_tokens: int, tokens_per_expert: Tensor | None = None) -> "TrainState":
        """One step of `num_tokens` further; `tokens_per_expert`: int64 [L, E], of the global batch."""
        unused = self.steps_since_use_LE
        if tokens_per_expert is not None:
            unused = steps_since_use(unused, tokens_per_expert)
        return TrainState(self.step + 1, self.tokens + num_tokens, unused)


def save(engine: Engine, state: TrainState, data_fingerprint: str) -> Path:
    """Write checkpoints/step_N. Collective; returns its folder.

    Every rank writes its part into a folder with another name; the manifest comes last, everything is synced,
    and one rename makes it a checkpoint. Raises `CheckpointError` on all ranks if any could not write.
    """
    run, ranks = engine.run, engine.ranks
    target = folders.step_folder(run.folder, state.step)
    if ranks.gather(target.exists())[0]:
        return target  # a run that went on from an older checkpoint comes by again: the same state
    torn = target.with_name(f".torn-{target.name}")
    tensors = dict(states.collect(engine))
    if ranks.speaks and state.steps_since_use_LE is not None:
        tensors[states.STEPS_SINCE_USE] = state.steps_since_use_LE.cpu()
    _together(ranks, torn, lambda: _begin(torn) if ranks.speaks else None)
    parts = _together(ranks, torn, lambda: _write_part(ranks.rank, tensors, torn))
    fixed = (state, data_fingerprint, ranks.world_size)
    _together(ranks, torn, lambda: _finish(run, *fixed, parts, torn, target) if ranks.speaks else None)
    return target


def _together(ranks: Ranks, folder: Path, work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank and wait for all; what one could not write is an error on every rank."""
    done: T | None = None
    fault = ""
    try:
        done = work()
    except (OSError, SafetensorError) as error:
        fault = f"rank {ranks.rank} could not write to {folder}: {getattr(error, 'strerror', None) or error}"
    faults = [said for said in ranks.gather(fault) if said]
    if faults:
        raise CheckpointError(
            f"{'; '.join(faults)}. Make room or give access; earlier checkpoints are as they were."
        )
    return ranks.gather(cast("T", done))


def _begin(torn: Path) -> None:
    """Sweep away what killed saves left, and make room for this one."""
    torn.parent.mkdir(parents=True, exist_ok=True)
    for left in torn.parent.glob(".torn-*"):
        shutil.rmtree(left)
    torn.mkdir()


@dataclass(frozen=True)
class _Part:
    files: dict[str, File]
    tensors: dict[str, str]


def _write_part(rank: int, tensors: dict[str, Tensor], folder: Path) -> _Part:
    files = {}
    for name, content in (
        (f"state-{rank:05d}.safetensors", tensors),
        (f"rng-{rank:05d}.safetensors", _rng()),
    ):
        if content:
            files[name] = _write(folder / name, content)
    return _Part(files, dict.fromkeys(tensors, f"state-{rank:05d}.safetensors"))


def _write(path: Path, tensors: dict[str, Tensor]) -> File:
    path.touch()
    mode = path.stat().st_mode  # what the user's umask gives; safetensors writes for the owner alone
    save_file(tensors, path)
    path.chmod(mode)
    _sync(path)
    return File(path.stat().st_size, folders.hash_file(path))


def _rng() -> dict[str, Tensor]:
    states_ = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states_["cuda"] = torch.cuda.get_rng_state()
    return states_


def _finish(
    run: RunConfig,
    state: TrainState,
    fingerprint: str,
    world_size: int,
    parts: list[_Part],
    torn: Path,
    target: Path,
) -> None:
    recipe = torn / "recipe.yaml"
    recipe.write_text(dump(run), encoding="utf-8")
    _sync(recipe)
    files = {name: file for part in parts for name, file in part.files.items()}
    files[recipe.name] = File(recipe.stat().st_size, folders.hash_file(recipe))
    files |= certificate.add(run, torn)
    manifest = Manifest(
        step=state.step,
        next_sample=state.step * run.train.global_batch_size,
        tokens=state.tokens,
        world_size=world_size,
        data_fingerprint=fingerprint,
        files=files,
        tensors={name: file for part in parts for name, file in part.tensors.items()},
    )
    folders.write_manifest(torn, manifest)
    _sync(torn)
    torn.rename(target)
    _sync(target.parent)
    _prune(run)


def _prune(run: RunConfig) -> None:
    if run.checkpoint.keep is not None:
        for step in folders.steps(run.folder)[: -run.checkpoint.keep]:
            shutil.rmtree(folders.step_folder(run.folder, step))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
