"""A model, a run and a tokenizer -> the pages beside the weights: config.json, generation_config.json, README.md."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from moe.config import ModelConfig
from moe.errors import ExportError
from moe.hf.family import Family, setting

Dtype = Literal["fp32", "bf16"]
TORCH_NAMES: Mapping[Dtype, str] = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokenizer's special tokens; None where it has none."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


def special_tokens(tokenizer: Path) -> SpecialTokens:
    """Read them from a folder with tokenizer.json and tokenizer_config.json.

    Raises `ExportError`: a file is missing or unreadable, or names a token that the vocabulary lacks.
    """
    from tokenizers import Tokenizer

    way_out = "Put the `tokenizer` folder of the run's prepared data there."
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (tokenizer / name).is_file():
            raise ExportError(
                f"{tokenizer / name} is missing, and a model is exported with its tokenizer. {way_out}"
            )
    try:
        vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        page = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
        texts = {role: _text(page.get(f"{role}_token")) for role in ("bos", "eos", "pad")}
    except Exception as error:  # tokenizers raises bare Exception
        raise ExportError(f"{tokenizer} cannot be read ({error}). {way_out}") from None
    ids = {role: vocabulary.token_to_id(text) for role, text in texts.items() if text}
    for role, token_id in ids.items():
        if token_id is None:
            raise ExportError(
                f"{tokenizer}: the {role} token {texts[role]!r} is not in the vocabulary. {way_out}"
            )
    return SpecialTokens(ids.get("bos"), ids.get("eos"), ids.get("pad"))


def config_page(
    family: Family, model: ModelConfig, tokens: SpecialTokens, *, dtype: Dtype, load_balancing_weight: float
) -> dict[str, Any]:
    """config.json with both spellings of what `transformers` 5 renamed, so that 4.x reads the same model."""
    page: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: _value(model, path) for key, path in family.settings.items()},
        **_OFF,
        **family.constants,
    }
    for part in family.parts:
        page |= part.write(model)
    page |= {
        "dtype": TORCH_NAMES[dtype],
        "torch_dtype": TORCH_NAMES[dtype],
        "transformers_version": version("transformers"),
        **asdict(tokens),
    }
    if model.moe is not None:
        # Theirs has its minimum at top_k, ours at 1 for any top_k.
        page["output_router_logits"] = False
        page["router_aux_loss_coef"] = load_balancing_weight / model.moe.top_k
        if page.get("intermediate_size", 0) is None:  # no layer has this width, but readers want a number
            page["intermediate_size"] = model.moe.expert_intermediate_size
    return page


_OFF = {"use_cache": True, "attention_dropout": 0.0}
_RESOLVED = {"attention.head_dim": "head_dim", "attention.num_kv_heads": "num_kv_heads"}
"""Settings whose null stands for a value, and where that is."""


def _value(model: ModelConfig, path: str) -> Any:
    return setting(model, _RESOLVED.get(path, path))


def generation_page(tokens: SpecialTokens) -> dict[str, Any]:
    """generation_config.json: the special tokens; padding falls back on the end of text."""
    padding = tokens.eos_token_id if tokens.pad_token_id is None else tokens.pad_token_id
    return {**asdict(tokens), "pad_token_id": padding, "transformers_version": version("transformers")}


def _text(token: Any) -> str | None:
    """A token's text; tokenizer_config.json writes it plain or as a block."""
    text: str | None = token["content"] if isinstance(token, dict) else token
    return text
