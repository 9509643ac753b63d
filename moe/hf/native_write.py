"""Weights by logical name -> a native folder, streamed: no more than one piece of a weight is held."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe import recipe
from moe.config import ModelConfig
from moe.errors import CheckpointError
from moe.hf.native import MODEL_TYPE, SECTION, VERSION, Stored, stored
from moe.hf.pages import TORCH_NAMES, Dtype
from moe.hf.stream import write_files, write_page
from moe.hf.write import copy_tokenizer

if TYPE_CHECKING:
    import torch

    from moe.model.source import Weights

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
MODEL_SECTION = "model.yaml"
"""The recipe's model section, ready to paste, beside the weights."""


@dataclass(frozen=True)
class WrittenNative:
    """What was written."""

    num_parameters: int
    num_tensors: int
    num_bytes: int
    """Of the weights."""
    weight_files: tuple[str, ...]


def write(
    folder: Path,
    weights: "Weights",
    *,
    origin: str,
    tokenizer: Path | None,
    settings: Mapping[str, Any],
    dtype: Dtype = "fp32",
    max_shard_size: int = 5 * 10**9,
    on_piece: Callable[[int], None] = lambda _: None,
) -> WrittenNative:
    """Write weights, settings, tokenizer and card into the existing `folder`.

    `origin` is what the card names as the source; `settings` are those of generation_config.json, special tokens
    included; `on_piece` hears of every tensor's number of elements. Raises `CheckpointError`: a weight too few or too
    many, another shape than the model section's, or values that are not finite.
    """
    plan = stored(weights.model)
    _check_names(plan, weights.names(), origin)
    import torch

    narrow = getattr(torch, TORCH_NAMES[dtype])
    planned = {
        key: (tensor.piece_shape, torch.float32 if tensor.wide else narrow)
        for tensor in plan
        for key in tensor.keys
    }
    parameters = sum(prod(tensor.shape) for tensor in plan)
    stream = _stream(plan, weights, origin, on_piece)
    files = write_files(folder, planned, stream, max_shard_size, parameters)
    size = sum(prod(shape) * kind.itemsize for shape, kind in planned.values())
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    write_pages(folder, weights.model, settings, dtype)
    (folder / "README.md").write_text(card(weights.model, origin, dtype, parameters), encoding="utf-8")
    return WrittenNative(parameters, len(planned), size, files)


def write_pages(folder: Path, model: ModelConfig, settings: Mapping[str, Any], dtype: Dtype) -> None:
    """config.json, generation_config.json and model.yaml."""
    write_page(folder / "config.json", config_page(model, settings, dtype))
    generation = {**settings, "use_cache": False, "transformers_version": version("transformers")}
    write_page(folder / "generation_config.json", generation)
    (folder / MODEL_SECTION).write_text(model_section(model), encoding="utf-8")


def config_page(model: ModelConfig, settings: Mapping[str, Any], dtype: Dtype) -> dict[str, Any]:
    """config.json: our model section, and what `transformers` and lm-eval want to know of any model."""
    return {
        "architectures": ["TurnoutForCausalLM"],
        "model_type": MODEL_TYPE,
        SECTION: {"version": VERSION, "model": model.model_dump(mode="json")},
        **facts(model),
        **{key: settings.get(key) for key in SPECIAL_TOKENS},
        "use_cache": False,
        "dtype": TORCH_NAMES[dtype],
        "transformers_version": version("transformers"),
    }


def facts(model: ModelConfig) -> dict[str, Any]:
    """Sizes under the names that others look for."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.attention.num_heads,
        "max_position_embeddings": model.max_sequence_length,
        "tie_word_embeddings": model.tie_embeddings,
    }


def model_section(model: ModelConfig) -> str:
    """The `model:` block of a recipe, every switch written out."""
    body = recipe.dump(model)
    return "model:\n" + "".join(f"  {line}\n" if line else "\n" for line in body.splitlines())


def card(model: ModelConfig, origin: str, dtype: Dtype, parameters: int) -> str:
    """README.md: what it is and how to use it."""
    rows = {
        "source": f"`{origin}`",
        "parameters": f"{parameters:,}",
        "layers, width": f"{model.num_layers}, {model.hidden_size}",
        "weights": TORCH_NAMES[dtype],
    }
    if model.moe is not None:
        rows["experts"] = (
            f"{model.moe.num_experts} in each of {len(model.sparse_layers)} layers, {model.moe.top_k} a token"
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _CARD.format(table=table, section=model_section(model).rstrip())


def _check_names(plan: list[Stored], names: Collection[str], origin: str) -> None:
    wanted = {tensor.name for tensor in plan}
    for fault, found in (("lacks", wanted - set(names)), ("holds", set(names) - wanted)):
        if found:
            raise CheckpointError(
                f"{origin} {fault} {sorted(found)[0]} and {len(found) - 1} others, unlike its model section: nothing "
                f"was written. Please report the model as a bug."
            )


def _stream(
    plan: list[Stored], weights: "Weights", origin: str, on_piece: Callable[[int], None]
) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Keys and float32 tensors in the order of the plan; none is kept."""
    for tensor in plan:
        pieces = weights.pieces(tensor.name)
        for key in tensor.keys:
            piece = next(pieces)  # zip would hold the one before meanwhile
            # Of all reductions this one needs no second tensor of that size, and it hands NaN on.
            if piece.numel() and not all(isfinite(extreme) for extreme in piece.aminmax()):
                raise CheckpointError(
                    f"{origin}: {tensor.name} holds values that are not finite: the file was damaged, or training had "
                    f"diverged. Get it again, or use an earlier checkpoint."
                )
            size = piece.numel()
            yield key, piece
            del piece  # else it would be held while the next is read
            on_piece(size)


_CARD = """\
---
library_name: turnout
pipeline_tag: text-generation
---
# A model in turnout's own form

| | |
|---|---|
{table}

Train on from it with `init_from: PATH` in a recipe that has the model section below, or load it:

```python
import moe.hf.auto  # makes AutoModelForCausalLM know this form
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

`turnout export PATH --to DIR` writes it as the stock architecture that has the same switches.

```yaml
{section}
```
"""
