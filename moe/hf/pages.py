"""A model, a run and a tokenizer -> the pages beside the weights: config.json, generation_config.json, README.md."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from moe import recipe
from moe.config import ModelConfig, RunConfig
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


def card(family: Family, run: RunConfig, step: int, dtype: Dtype, certified: str = "") -> str:
    """README.md: what the model is, what it was trained on and how, and how to load it.

    `certified`: what the run's certificate says; empty without one.
    """
    from moe.model.count import count

    counted = count(run.model, run.data.sequence_length)
    batch = run.train.global_batch_size * run.data.sequence_length
    rows = {
        "architecture": f"`{family.architecture}`",
        "parameters": f"{counted.total_parameters:,}",
        "layers, width": f"{run.model.num_layers}, {run.model.hidden_size}",
        "training": f"{step:,} steps, {step * batch:,} tokens ({batch:,} a step)",
        "weights": TORCH_NAMES[dtype],
    }
    if (moe := run.model.moe) is not None:
        rows["experts"] = (
            f"{moe.num_experts} in each of {len(run.model.sparse_layers)} layers, {moe.top_k} a token"
        )
    if certified:
        rows["certificate"] = certified
    # The data folder's place on somebody's disk is nobody else's business.
    public = run.model_copy(
        update={"run_dir": None, "data": run.data.model_copy(update={"path": Path(run.data.path).name})}
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _CARD.format(name=run.name, table=table, recipe=recipe.dump(public).rstrip())


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

Trained from random weights with turnout.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

## Recipe

```yaml
{recipe}
```
"""


def _text(token: Any) -> str | None:
    """A token's text; tokenizer_config.json writes it plain or as a block."""
    text: str | None = token["content"] if isinstance(token, dict) else token
    return text
