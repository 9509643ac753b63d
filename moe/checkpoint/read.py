"""checkpoints/step_N -> the weights alone, on demand, whole, on any machine; no engine needed."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from moe.checkpoint import folder as folders
from moe.checkpoint.folder import Manifest
from moe.checkpoint.keys import Key
from moe.checkpoint.unmapped import TensorFile
from moe.config import ModelConfig, RunConfig
from moe.errors import CheckpointError
from moe.model import Transformer
from moe.model.source import copy
from moe.recipe import load
from moe.sparse import lora

_PREFIX = "weight/"


class SavedModel:
    """The float32 master weights of one checkpoint, verified when opened: by hash, unless that was done elsewhere."""

    def __init__(self, run: RunConfig, folder: Path, manifest: Manifest) -> None:
        self.run = run
        self.folder = folder
        self.manifest = manifest
        self._files: dict[str, TensorFile] = {}
        self._keys: dict[str, list[str]] = {}
        """Parameter -> its keys, expert by expert."""
        weights = [(key, Key.parse(key)) for key in manifest.tensors if key.startswith(_PREFIX)]
        for text, key in sorted(weights, key=lambda pair: pair[1].expert or 0):
            self._keys.setdefault(key.parameter, []).append(text)

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def model(self) -> ModelConfig:
        return self.run.model

    @classmethod
    def open(cls, run_folder: Path, step: int | None = None, *, verify: bool = True) -> "SavedModel":
        """The checkpoint of `step` in a run's folder; None: the newest. Raises `CheckpointError`.

        Without `verify` only the sizes of its files are looked at.
        """
        step = chosen(run_folder, step)
        folder = folders.step_folder(run_folder, step)
        manifest = folders.read_manifest(folder)
        (folders.verify if verify else folders.verify_sizes)(folder, manifest)
        return cls(load(RunConfig, folder / "recipe.yaml"), folder, manifest)

    def names(self) -> list[str]:
        """Logical parameter names, experts of a stacked parameter counted as one; no adapters."""
        return [name for name in self._keys if not lora.is_adapter(name)]

    def pieces(self, name: str, only: range | None = None) -> Iterator[Tensor]:
        """A parameter, float32, on the CPU: whole, or of a stacked one its experts (`only` those) in order.

        None is kept. An adapted one comes with its adapter merged into it.
        """
        stored = self.stored(name, only)
        if name + lora.A not in self._keys:
            return stored
        assert self.run.lora is not None
        halves = self.stored(name + lora.A, only), self.stored(name + lora.B, only)
        return map(partial(lora.merged, scale=self.run.lora.scale), stored, *halves)

    def adapted(self) -> list[str]:
        """Names of the parameters that have an adapter."""
        return [name for name in self.names() if name + lora.A in self._keys]

    def stored(self, name: str, only: range | None = None) -> Iterator[Tensor]:
        """As `pieces`, but as it was trained: a frozen weight without its adapter, or half of an adapter."""
        if name not in self._keys:
            raise CheckpointError(f"{self.folder} has no parameter {name}.")
        keys = self._keys[name]
        return map(self._read, keys if only is None else keys[only.start : only.stop])

    def into(self, model: Transformer) -> None:
        """Copy every weight and buffer into an unsharded model, in its dtype."""
        copy(model, "", self)

    def _read(self, key: str) -> Tensor:
        name = self.manifest.tensors[key].file
        if name not in self._files:
            self._files[name] = TensorFile(self.folder / name)
        return self._files[name].read(key)


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
