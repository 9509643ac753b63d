"""Models as Python values: a folder -> a `Transformer`, and a `Transformer` -> a folder that stock code loads."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import ConfigError

if TYPE_CHECKING:
    from moe.hf.pages import Dtype
    from moe.hf.write import Written
    from moe.model import Transformer


def from_pretrained(folder: str | Path, *, dtype: "Dtype" = "fp32") -> "Transformer":
    """The model of a Hugging Face folder, a native folder or a run (its newest checkpoint), whole, on the CPU.

    It is in evaluation mode; selection biases are float32 whatever `dtype`. Its tokenizer is
    `transformers.AutoTokenizer.from_pretrained(folder)`, of a run that of `folder/tokenizer`. Raises
    `CheckpointError`: nothing there that can be read whole.
    """
    import torch

    from moe.hf.pages import TORCH_NAMES
    from moe.hf.source import open_weights
    from moe.model import Transformer
    from moe.model.source import copy, materialize

    if dtype not in TORCH_NAMES:
        raise ConfigError(f"dtype is {dtype!r}: use one of {', '.join(map(repr, TORCH_NAMES))}.")
    weights = open_weights(Path(folder))
    with torch.device("meta"):
        model = Transformer(weights.model)
    materialize(model, torch.device("cpu"), getattr(torch, TORCH_NAMES[dtype]), {})
    copy(model, "", weights)
    return model.eval()


def save_pretrained(
    model: "Transformer",
    folder: str | Path,
    *,
    tokenizer: Any,
    dtype: "Dtype" = "fp32",
    max_shard_size: int = 5 * 10**9,
) -> "Written":
    """Write a whole model as its stock architecture into the new `folder`, which appears when it is whole.

    `tokenizer` is a folder that holds one, or a tokenizer of `transformers`. Raises `ExportError`: no stock
    architecture, no tokenizer, `folder` is taken.
    """
    from moe.hf import write
    from moe.model.source import Held

    held = Held(model)
    with (
        tempfile.TemporaryDirectory(prefix="turnout-tokenizer-") as scratch,
        write.new_folder(Path(folder)) as new,
    ):
        if isinstance(tokenizer, str | Path):
            place = Path(tokenizer)
        else:
            place = Path(scratch)
            tokenizer.save_pretrained(place)
        return write.write_model(
            new,
            held.model,
            held.names(),
            held.pieces,
            place,
            _CARD.format(parameters=sum(parameter.numel() for parameter in model.parameters())),
            dtype=dtype,
            max_shard_size=max_shard_size,
        )


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# A model written from Python

{parameters:,} parameters, written by `moe.hf.save_pretrained` of turnout.
"""
