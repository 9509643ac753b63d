"""What a user names -> the Hugging Face folder that it is, its weights, and the pages beside them."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import CheckpointError, ConfigError
from moe.hf.native import is_native, read_config
from moe.hf.native_write import SPECIAL_TOKENS
from moe.hf.write import TOKENIZER_FILES

if TYPE_CHECKING:
    from moe.model.source import Weights

_WANTED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *TOKENIZER_FILES,
)
_UNWANTED = ("*/*",)
"""Copies of the weights in other forms, which some repositories keep in folders."""


def find(source: str | Path) -> tuple[Path, "Weights"]:
    """The Hugging Face folder at a path, or the cached copy of the repository of that name, and its weights.

    Raises `ConfigError`: neither, or a native folder; `CheckpointError`: the model cannot be read.
    """
    from moe.hf.source import open_weights

    folder = resolve(source)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{source} is no Hugging Face folder: there is no config.json. Give one, or a name on the Hub (ORG/NAME)."
        )
    if is_native(read_config(folder)):
        raise ConfigError(f"{source} is imported already. Use it as it is: init_from: {source}")
    return folder, open_weights(folder)


def resolve(source: str | Path) -> Path:
    """A folder as it is; a name on the Hub: its copy in the usual cache, fetched if need be. Raises `ConfigError`."""
    if Path(source).is_dir():
        return Path(source)
    name = str(source)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ConfigError(f"{name} is no folder, nor a name on the Hub (ORG/NAME). Give one of them.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)))
    except Exception as error:  # half a dozen kinds: no network, no such repository, no right to it, no space
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"{name} is no folder here, and the Hub does not give it ({reason}). Check the name, the network and "
            f"HF_HUB_OFFLINE; for a model behind a gate, log in with `hf auth login`; or give a folder."
        ) from None


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in the folder."""
    return any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    )


def generation_settings(folder: Path) -> dict[str, Any]:
    """generation_config.json, if there is one, with the special tokens that config.json names where it names none."""
    config = read_config(folder)
    path = folder / "generation_config.json"
    page: dict[str, Any] = {}
    if path.is_file():
        try:
            page = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}). Mend or remove it.") from None
    tokens = {key: page.get(key, config.get(key)) for key in SPECIAL_TOKENS}
    if tokens["pad_token_id"] is None:
        end = tokens["eos_token_id"]
        tokens["pad_token_id"] = end[0] if isinstance(end, list) and end else end
    return {**page, **tokens}
