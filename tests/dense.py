"""Small dense models made by stock `transformers`, and their folders read as logical weights."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moe.config import ModelConfig
from moe.hf.convert import moves
from moe.hf.families import FAMILIES
from tests.stock import write_tokenizer

_BIASED = {"qwen2"}
_QK_NORM = {"qwen3"}


def write_dense(folder: Path, model_type: str, **changes: Any) -> Path:
    """A stock model with random weights, wide enough that every matrix moves the logits, and a tokenizer."""
    import transformers

    page: dict[str, Any] = {
        "vocab_size": 112,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 3e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1234.0},
        "tie_word_embeddings": False,
        "initializer_range": 0.03,
        **changes,
    }
    config = transformers.AutoConfig.for_model(model_type, **page)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * drawn if "norm" in name else 0.25 * drawn)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@dataclass(frozen=True)
class DenseFolder:
    """A folder of Llama, Qwen3 or Qwen2."""

    model: ModelConfig
    weights: dict[str, torch.Tensor]

    @classmethod
    def open(cls, folder: Path) -> "DenseFolder":
        page = json.loads((folder / "config.json").read_text())
        kind = page["model_type"]
        model = ModelConfig.model_validate(
            {
                "vocab_size": page["vocab_size"],
                "hidden_size": page["hidden_size"],
                "num_layers": page["num_hidden_layers"],
                "intermediate_size": page["intermediate_size"],
                "max_sequence_length": page["max_position_embeddings"],
                "norm_eps": page["rms_norm_eps"],
                "tie_embeddings": page["tie_word_embeddings"],
                "init_std": page["initializer_range"],
                "attention": {
                    "num_heads": page["num_attention_heads"],
                    "num_kv_heads": page["num_key_value_heads"],
                    "head_dim": page.get("head_dim"),
                    "qk_norm": kind in _QK_NORM,
                    "qkv_bias": kind in _BIASED,
                    "rope_theta": page["rope_parameters"]["rope_theta"],
                },
            }
        )
        (family,) = (family for family in FAMILIES if family.model_type == kind)
        disk = load_file(folder / "model.safetensors")
        return cls(
            model,
            {move.ours: move.join([disk[key] for key in move.disk]) for move in moves(family, model)},
        )

    def names(self) -> list[str]:
        return list(self.weights)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        yield self.weights[name].clone()
