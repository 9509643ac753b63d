"""A path -> the weights there, whoever wrote them: a Hugging Face folder, a native folder, a run."""

from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import CheckpointError
from moe.hf.native import NativeFolder, is_native, read_config

if TYPE_CHECKING:
    from moe.model.source import Weights


def open_weights(path: Path, *, verify: bool = True) -> "Weights":
    """By its config.json a native or a Hugging Face folder, by its recipe.yaml a run, whose newest checkpoint counts.

    With `verify` what has hashes, a run, is compared with them. Raises `CheckpointError`: none of these, or not whole.
    """
    if (path / "config.json").is_file():
        if is_native(read_config(path)):
            return NativeFolder.open(path)
        from moe.hf.folder import HFFolder

        return HFFolder.open(path)
    if (path / "recipe.yaml").is_file():
        from moe.checkpoint.read import SavedModel

        return SavedModel.open(path, verify=verify)
    raise CheckpointError(
        f"{path} holds no model: there is neither a config.json nor a recipe.yaml. Give a folder that transformers, "
        f"`turnout import` or `turnout export` has written, or the folder of a run."
    )


def tokenizer_folder(path: Path) -> Path:
    """Where the tokenizer of the model at `path` is: beside the weights, or in a run's own folder."""
    return path / "tokenizer" if (path / "recipe.yaml").is_file() else path
