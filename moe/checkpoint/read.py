"""checkpoints/step_N -> the weights alone, on demand, whole, on any machine; no engine needed."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from moe.checkpoint import folder as folders
from moe.checkpoint.folder import Manifest
from moe.config import RunConfig
from moe.errors import CheckpointError
from moe.model import Transformer
from moe.recipe import load

_PREFIX = "weight/"


class SavedModel:
    """The float32 master weights of one checkpoint, verified by hash when opened."""

    def __init__(self, run: RunConfig, folder: Path, manifest: Manifest) -> None:
        self.run = run
        self.folder = folder
        self.manifest = manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @classmethod
    def open(cls, run_folder: Path, step: int | None = None) -> "SavedModel":
        """The checkpoint of `step` in a run's folder; None: the newest. Raises `CheckpointError`."""
        step = chosen(run_folder, step)
        folder = folders.step_folder(run_folder, step)
        manifest = folders.read_manifest(folder)
        folders.verify(folder, manifest)
        return cls(load(RunConfig, folder / "recipe.yaml"), folder, manifest)

    def names(self) -> list[str]:
        """Logical parameter names, experts of a stacked parameter counted as one."""
        return list(dict.fromkeys(_split(key)[0] for key in self._weight_keys()))

    def tensor(self, name: str) -> Tensor:
        """A whole parameter, float32, on the CPU; stacked parameters are [E, ...]."""
        keys = sorted((k for k in self._weight_keys() if _split(k)[0] == name), key=lambda k: _split(k)[1])
        if not keys:
            raise CheckpointError(f"{self.folder} has no parameter {name}.")
        parts = [self._read(key) for key in keys]
        return parts[0] if keys == [_PREFIX + name] else torch.stack(parts)

    def into(self, model: Transformer) -> None:
        """Copy every weight and buffer into an unsharded model, in its dtype."""
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.copy_(self.tensor(name))

    def _weight_keys(self) -> Iterator[str]:
        return (key for key in self.manifest.tensors if key.startswith(_PREFIX))

    def _read(self, key: str) -> Tensor:
        with safe_open(self.folder / self.manifest.tensors[key].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor


def chosen(run_folder: Path, step: int | None) -> int:
    """`step`, if there is a checkpoint of it; None: the newest's. Raises `CheckpointError` naming those there are."""
    if step is not None and (folders.step_folder(run_folder, step) / folders.MANIFEST).is_file():
        return step
    found = folders.steps(run_folder)
    if not found:
        raise CheckpointError(
            f"{run_folder} holds no checkpoint: it must be the folder of a run that has saved one. "
            f"Give such a folder, or train first."
        )
    if step is not None:
        raise CheckpointError(
            f"{run_folder} has no checkpoint of step {step}. It has {', '.join(map(str, found))}: use one of them."
        )
    return found[-1]


def _split(key: str) -> tuple[str, int]:
    """(parameter, expert) of a weight's key; expert -1 for a parameter that is whole."""
    match = re.fullmatch(r"weight/(.*?)(?:\[(\d+)\])?", key)
    assert match is not None
    return match[1], int(match[2]) if match[2] else -1
