"""A native folder -> its model section and its weights by logical name: what `turnout import` writes.

It has a Hugging Face folder's shape: config.json with `model_type: turnout`, safetensors files with an index, a
tokenizer, generation_config.json. Its keys are our logical names, but each expert stands by itself, so that a rank
reads its own alone: `layers.3.ffn.experts.gate_up` is `layers.3.ffn.experts.0.gate_up`, `...experts.1.gate_up`, ...
Weights are float32 or bfloat16, selection biases always float32.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.config import ModelConfig
from moe.config.base import build
from moe.config.shape import shape_faults
from moe.errors import CheckpointError, ConfigError
from moe.hf.convert import few

if TYPE_CHECKING:
    import torch

    from moe.checkpoint.unmapped import TensorFile

MODEL_TYPE = "turnout"
SECTION = "turnout"
"""The key of config.json that holds our part: the format's version and the model section."""
VERSION = 1


@dataclass(frozen=True)
class Stored:
    """A logical tensor and how it stands in a native folder."""

    name: str
    shape: tuple[int, ...]
    """Of the whole."""
    stacked: bool
    """Whether dimension 0 counts experts, each of which stands by itself."""
    wide: bool
    """Whether it is float32 in every folder: a buffer, which steps too small for bfloat16 have made."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Of its pieces, in order."""
        if not self.stacked:
            return (self.name,)
        place, _, own = self.name.rpartition(".")
        return tuple(f"{place}.{expert}.{own}" for expert in range(self.shape[0]))

    @property
    def piece_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape


def stored(model: ModelConfig) -> list[Stored]:
    """Every parameter and buffer of the model, bottom to top; a weight tied to another is not there."""
    import torch

    from moe.model import Transformer
    from moe.sparse.experts import Experts

    with torch.device("meta"):
        transformer = Transformer(model)
    experts = {name for name, module in transformer.named_modules() if isinstance(module, Experts)}
    parameters = [(name, tensor, False) for name, tensor in transformer.named_parameters()]
    buffers = [(name, tensor, True) for name, tensor in transformer.named_buffers()]
    return [
        Stored(name, tuple(tensor.shape), name.rpartition(".")[0] in experts, wide)
        for name, tensor, wide in (*parameters, *buffers)
    ]


def is_native(page: dict[str, Any]) -> bool:
    """Whether a config.json is that of a native folder."""
    return page.get("model_type") == MODEL_TYPE


def model_of(page: dict[str, Any], source: str) -> ModelConfig:
    """The model section of a native config.json; raises `CheckpointError` if it is none that this version reads."""
    section = page.get(SECTION)
    section = section if isinstance(section, dict) else {}
    if section.get("version") != VERSION:
        raise CheckpointError(
            f"{source}: its {SECTION} section has version {section.get('version')!r}, but this version of turnout "
            f"reads {VERSION}. Use the version that wrote it, or import the model again."
        )
    try:
        model = build(ModelConfig, section.get("model") or {}, source)
    except ConfigError as error:
        raise CheckpointError(
            f"{error} A newer version of turnout may have written it: use that one, or import the model again."
        ) from None
    if faults := shape_faults(model):
        raise CheckpointError(f"{source}: {faults[0]}")
    return model


class NativeFolder:
    """The weights of a native folder; nothing of them is held."""

    def __init__(self, path: Path, model: ModelConfig, files: dict[str, "TensorFile"]) -> None:
        """`files`: the file of every key."""
        self.path = path
        self.model = model
        self._files = files
        self._stored = {tensor.name: tensor for tensor in stored(model)}

    @classmethod
    def open(cls, path: Path) -> "NativeFolder":
        """Raises `CheckpointError`: no native folder, a key or file too few or too many, or another shape."""
        from moe.hf.folder import tensor_files

        folder = cls(path, model_of(read_config(path), str(path / "config.json")), tensor_files(path))
        folder._check()
        return folder

    def names(self) -> list[str]:
        """Logical names, experts of a stacked parameter counted as one."""
        return list(self._stored)

    def pieces(self, name: str, only: range | None = None) -> Iterator["torch.Tensor"]:
        """float32 on the CPU: the experts of a stacked parameter (`only` those) in order, or the whole of any other."""
        if name not in self._stored:
            raise CheckpointError(f"{self.path} has no parameter {name}.")
        keys = self._stored[name].keys
        return (
            self._files[key].read(key).float()
            for key in (keys if only is None else keys[only.start : only.stop])
        )

    def _check(self) -> None:
        wanted = {key: tensor.piece_shape for tensor in self._stored.values() for key in tensor.keys}
        if missing := sorted(wanted.keys() - self._files.keys()):
            raise CheckpointError(
                f"{self.path} lacks {few(missing)}: it is not whole. Import the model again."
            )
        if unknown := sorted(self._files.keys() - wanted.keys()):
            raise CheckpointError(
                f"{self.path} holds {few(unknown)}, which its model section has no place for. Import the model again."
            )
        for key, shape in wanted.items():
            found = self._files[key].shapes()[key]
            if found != shape:
                raise CheckpointError(
                    f"{self._files[key].path}: {key} has shape {list(found)}, but the model section makes it "
                    f"{list(shape)}. Import the model again."
                )


def read_config(path: Path) -> dict[str, Any]:
    """config.json; raises `CheckpointError` if there is none or it is none."""
    file = path / "config.json"
    try:
        page = json.loads(file.read_bytes())
        if not isinstance(page, dict):
            raise ValueError("it is no block of settings")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}). Give a folder that transformers has saved, or `turnout import` written."
        ) from None
    return page
