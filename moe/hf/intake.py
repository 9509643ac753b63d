"""A stock config.json -> the row of the table and our model section, or what we have no switch for."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.config import ModelConfig
from moe.config.base import build
from moe.config.shape import shape_faults
from moe.errors import CheckpointError, ConfigError
from moe.hf.families import FAMILIES
from moe.hf.family import NEUTRAL, SET, Family
from moe.hf.match import differences
from moe.hf.native import read_config

_HARMLESS = {
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "global_attn_every_n_layers",
    "head_dim",
    "input_jitter_noise",
    "intermediate_size",
    "num_key_value_heads",
    "output_router_logits",
    "pad_token_id",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "sliding_window_pattern",
    "use_cache",
}
"""Keys that the function of a model does not hang on, where the row does not speak of them."""


def model_of(folder: Path) -> tuple[Family, ModelConfig]:
    """Read config.json as stock code normalises it.

    Raises `CheckpointError`: no or a damaged config.json, an architecture that is not in the table, a setting that we
    have no switch for, quantised weights.
    """
    page = read_config(folder)
    family = next((family for family in FAMILIES if family.model_type == page.get("model_type")), None)
    if family is None:
        raise CheckpointError(
            f"{folder}/config.json says model_type {page.get('model_type')!r}, which is not in the table of "
            f"architectures. There are {', '.join(sorted(family.model_type for family in FAMILIES))}."
        )
    if page.get("quantization_config"):
        raise CheckpointError(
            f"{folder} holds quantised weights (quantization_config). Convert them to bfloat16 first, for example by "
            f"from_pretrained(...).dequantize() and save_pretrained of transformers."
        )
    stock, default = _normalized(folder, family)
    try:
        return family, read_page(family, stock, default)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}/config.json: {_said(error)}, which the {family.model_type} row of the table has no switch for. "
            f"Change the setting, if the weights allow it, or use another checkpoint."
        ) from None
    except ConfigError as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from None


def read_page(family: Family, page: Mapping[str, Any], default: Mapping[str, Any]) -> ModelConfig:
    """A normalised page -> the model section. Raises `ValueError` or `ConfigError` saying what does not fit.

    `default` is the page of the architecture without settings: a key of it that the row does not know must have its
    value there, else it would be lost.
    """
    known = {*family.settings, *family.constants, *(key for part in family.parts for key in part.keys)}
    for key, value in family.constants.items():
        if key in page and page[key] != value:
            raise ValueError(f"{key} is {page[key]!r}")
    for key, value in default.items():
        if key not in known | _HARMLESS and page.get(key, value) != value:
            raise ValueError(f"{key} is {page[key]!r}")
    found: dict[str, Any] = {path: value for path, value in NEUTRAL.items() if _applies(family, path)}
    found |= {path: value for path, value in family.needs.items() if value is not SET}
    for key, path in reversed(list(family.settings.items())):
        if key in page:
            found[path] = page[key]
    for part in family.parts:
        found |= part.read(page)
    if found.get("init_std") == 0:
        del found["init_std"]  # stock code may say 0; it would initialise nothing here
    model = build(ModelConfig, _without_idle(_nested(found)), "the model")
    if faults := shape_faults(model):
        raise ConfigError("\n       ".join(faults))
    if changes := differences(family, model):
        raise ConfigError(
            f"stock {family.model_type} has {', '.join(changes)}. Change the settings, if the weights allow it, or use "
            f"another checkpoint."
        )
    return model


def _applies(family: Family, path: str) -> bool:
    return family.sparse or not path.startswith("moe")


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted path -> blocks; a block that is null stays out."""
    page: dict[str, Any] = {}
    for path, value in values.items():
        *blocks, name = path.split(".")
        here = page
        for block in blocks:
            here = here.setdefault(block, {}) or here.setdefault(block, {})
        if not (path in ("moe", "attention.latent") and value is None):
            here[name] = value
    return page


def _without_idle(page: dict[str, Any]) -> dict[str, Any]:
    """Leave out what stock code says but nothing in the model has, the width of dense layers where there are none, and
    what follows from other settings.
    """
    attention, moe = page["attention"], page.get("moe")
    width = attention.get("head_dim")
    if width is not None and width * attention["num_heads"] == page["hidden_size"]:
        del attention["head_dim"]  # some stock code says it, some leaves it out
    if moe is not None:
        dense = moe.get("first_k_dense", 0) + len(moe.get("dense_layers", ()))
        if not dense:
            page.pop("intermediate_size", None)
        if moe.get("num_expert_groups") is None:
            moe.pop("group_score", None)
    return page


def _normalized(folder: Path, family: Family) -> tuple[dict[str, Any], dict[str, Any]]:
    """The folder's settings and the architecture's own, as stock code fills them in."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever settings make of half a dozen validators
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{folder}/config.json: transformers refuses it ({reason}). Mend it.") from None
    default = transformers.AutoConfig.for_model(family.model_type).to_dict()
    every = transformers.PreTrainedConfig().to_dict()  # what all architectures have: labels, types, versions
    return config.to_dict(), {key: value for key, value in default.items() if key not in every}


def _said(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
