"""A Hugging Face folder, a native one or a saved run -> a `transformers` model and tokenizer, ready to generate."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.config import RunConfig
from moe.errors import CheckpointError, ConfigError, ExportError
from moe.hf.convert import check_names, disk_tensors, moves
from moe.hf.match import family_of
from moe.hf.native import is_native, read_config
from moe.hf.pages import config_page, special_tokens

if TYPE_CHECKING:
    from collections.abc import Collection

    from moe.checkpoint.read import SavedModel
    from moe.hf.convert import Read


def open_model(source: Path, step: int | None = None) -> tuple[Any, Any]:
    """A `PreTrainedModel` and its tokenizer from a run (its newest checkpoint, or that of `step`), a Hugging Face
    folder or a native one.

    Stock code runs what has a stock architecture, native folders aside; the rest is a `TurnoutForCausalLM`. Raises
    `CheckpointError`: none of these, or not loadable; `ConfigError`: a step of what is no run.
    """
    if (source / "config.json").is_file():
        if step is not None:
            raise ConfigError(f"--step is {step}, but {source} is no run: it has no steps. Remove it.")
        if is_native(read_config(source)):
            import moe.hf.auto  # noqa: F401  makes the loader know them
        return from_folder(source)
    if not (source / "recipe.yaml").is_file():
        raise CheckpointError(
            f"{source} is neither a run folder (no recipe.yaml) nor a Hugging Face folder (no config.json). "
            f"Give a folder made by `turnout train`, `turnout export` or `turnout import`."
        )
    from moe.checkpoint.read import SavedModel

    saved = SavedModel.open(source, step)
    try:
        return from_run(saved.run, saved.names(), saved.pieces, source / "tokenizer")
    except ExportError:
        return _ours(saved, source / "tokenizer")


def from_folder(folder: Path) -> tuple[Any, Any]:
    """A `PreTrainedModel` and its tokenizer; raises `CheckpointError` if stock code cannot load them whole."""
    transformers = _quiet()
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, local_files_only=True
        )
    except Exception as error:  # whatever a damaged folder makes of half a dozen libraries
        raise CheckpointError(_unloadable(folder, error)) from None
    wrong = [key for kind in ("missing_keys", "mismatched_keys") for key in loading.get(kind) or ()]
    if wrong:
        raise CheckpointError(
            f"{folder} lacks {wrong[0]} and {len(wrong) - 1} more of its weights: the model would be partly random. "
            f"Export it again."
        )
    return model.eval(), tokenizer_from(folder)


def from_run(run: RunConfig, names: "Collection[str]", read: "Read", tokenizer: Path) -> tuple[Any, Any]:
    """The stock model that an export of the run would load as, and its tokenizer; nothing is written.

    Raises `ExportError`: no stock architecture, or no tokenizer.
    """
    import torch

    transformers = _quiet()
    family = family_of(run.model)
    plan = moves(family, run.model)
    check_names(plan, names)
    page = config_page(family, run.model, special_tokens(tokenizer), dtype="fp32", load_balancing_weight=0.0)
    config = transformers.AutoConfig.for_model(**page)
    model = getattr(transformers, family.architecture).from_pretrained(
        None, config=config, state_dict=dict(disk_tensors(plan, read)), dtype=torch.float32
    )
    return model.eval(), tokenizer_from(tokenizer)


def _ours(saved: "SavedModel", tokenizer: Path) -> tuple[Any, Any]:
    """A run whose model has no stock architecture."""
    from dataclasses import asdict

    _quiet()
    from moe.hf.auto import TurnoutForCausalLM
    from moe.model import Transformer

    transformer = Transformer(saved.model)
    saved.into(transformer)
    return TurnoutForCausalLM.of(transformer, **asdict(special_tokens(tokenizer))).eval(), tokenizer_from(
        tokenizer
    )


def tokenizer_from(folder: Path) -> Any:
    """The tokenizer in `folder`; raises `CheckpointError` if there is none or stock code cannot load it."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        # Stock code would make up an empty one from config.json, and say nothing.
        raise CheckpointError(f"{folder} holds no tokenizer. Give a folder written by `turnout export`.")
    try:
        return _quiet().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise CheckpointError(_unloadable(folder, error, "tokenizer")) from None


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def _quiet() -> Any:
    """The `transformers` module, offline, without progress bars and advice."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _unloadable(folder: Path, error: Exception, what: str = "model") -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{folder}: its {what} cannot be loaded ({reason}). Give a folder written by `turnout export`."
