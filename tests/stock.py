"""Small models of every stock architecture with random weights, as a saved run would hand them out."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moe.config import ModelConfig, RunConfig
from moe.hf.convert import moves
from moe.hf.match import family_of
from moe.recipe import dump


def model(
    *, qk_norm: bool = True, qkv_bias: bool = False, moe: dict[str, Any] | None = None, **changes: Any
) -> ModelConfig:
    """Every size and setting differs from the others and from the stock defaults, unless changed."""
    settings: dict[str, Any] = {
        "vocab_size": 112,
        "hidden_size": 24,
        "num_layers": 3,
        "max_sequence_length": 96,
        "norm_eps": 3e-5,
        "attention": {
            "num_heads": 6,
            "num_kv_heads": 2,
            "head_dim": 8,
            "qk_norm": qk_norm,
            "qkv_bias": qkv_bias,
            "rope_theta": 1234.0,
        },
    }
    if moe is not None:
        settings["moe"] = {"num_experts": 5, "top_k": 2, "expert_intermediate_size": 20, **moe}
    if moe is None or moe.get("first_k_dense"):
        settings["intermediate_size"] = 28
    attention = settings["attention"] | changes.pop("attention", {})
    return ModelConfig.model_validate({**settings, **changes, "attention": attention})


# All matrices of a sparse layer are square, and there are as many experts as columns: a transposition fits anywhere.
_SQUARE = {"hidden_size": 16, "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 4}}
_SQUARE_MOE = {"num_experts": 16, "top_k": 4, "expert_intermediate_size": 16}
_QUOTIENT = {"head_dim": 4}  # hidden_size / num_heads, which qwen2_moe has built in
_SHARED = {"shared_expert_intermediate_size": 36, "shared_expert_gate": True}

CASES: dict[str, tuple[str, ModelConfig]] = {
    "qwen3_moe": ("qwen3_moe", model(moe={})),
    "qwen3_moe, first layers dense, tied": (
        "qwen3_moe",
        model(moe={"first_k_dense": 2}, tie_embeddings=True),
    ),
    "qwen3_moe, square, not normalised": (
        "qwen3_moe",
        model(
            moe={**_SQUARE_MOE, "normalize_top_k": False, "first_k_dense": 1}, **_SQUARE, intermediate_size=16
        ),
    ),
    "qwen3_moe, one expert a token": ("qwen3_moe", model(moe={"top_k": 1, "normalize_top_k": False})),
    "mixtral": ("mixtral", model(moe={}, qk_norm=False)),
    "mixtral, square, tied": (
        "mixtral",
        model(moe=_SQUARE_MOE, qk_norm=False, tie_embeddings=True, **_SQUARE),
    ),
    "qwen2_moe": ("qwen2_moe", model(moe=_SHARED, qk_norm=False, qkv_bias=True, attention=_QUOTIENT)),
    "qwen2_moe, square, first layer dense, tied": (
        "qwen2_moe",
        model(
            moe={**_SQUARE_MOE, **_SHARED, "shared_expert_intermediate_size": 16, "first_k_dense": 1},
            qk_norm=False,
            qkv_bias=True,
            tie_embeddings=True,
            intermediate_size=16,
            **_SQUARE,
        ),
    ),
    "qwen2_moe, not normalised": (
        "qwen2_moe",
        model(moe={**_SHARED, "normalize_top_k": False}, qk_norm=False, qkv_bias=True, attention=_QUOTIENT),
    ),
    "qwen3": ("qwen3", model()),
    "qwen3, square, tied": ("qwen3", model(tie_embeddings=True, intermediate_size=16, **_SQUARE)),
    "llama": ("llama", model(qk_norm=False)),
    "llama, square, tied": (
        "llama",
        model(qk_norm=False, tie_embeddings=True, intermediate_size=16, **_SQUARE),
    ),
    "qwen2": ("qwen2", model(qk_norm=False, qkv_bias=True)),
    "qwen2, square, tied": (
        "qwen2",
        model(qk_norm=False, qkv_bias=True, tie_embeddings=True, intermediate_size=16, **_SQUARE),
    ),
}
"""What it shows -> (model_type, model)."""


def run_of(model: ModelConfig, *, load_balancing_weight: float = 0.03) -> RunConfig:
    """A recipe around the model."""
    page: dict[str, Any] = {
        "name": "tiny",
        "model": model.model_dump(),
        "data": {"path": "/secret/place/corpus", "sequence_length": 32},
        "train": {
            "steps": 20,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "optimizer": {"learning_rate": 1e-3},
        },
    }
    if model.moe is not None:
        page["balance"] = {"sequence_loss_weight": load_balancing_weight}
    return RunConfig.model_validate(page)


def random_weights(model: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Logical names -> float32; wide enough that a misplaced matrix moves every logit."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for move in moves(family_of(model), model):
        drawn = torch.randn(move.shape, generator=generator) * 0.2
        weights[move.ours] = drawn + 1.0 if "norm" in move.ours else drawn
    return weights


@dataclass(frozen=True)
class Saved:
    """What a saved model hands to an export."""

    run: RunConfig
    weights: dict[str, torch.Tensor]
    step: int = 12

    def names(self) -> list[str]:
        return list(self.weights)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        stacked = ".experts." in name
        yield from (part.clone() for part in (self.weights[name] if stacked else [self.weights[name]]))


def saved(model: ModelConfig) -> Saved:
    """The model, saved with random weights."""
    return Saved(run_of(model), random_weights(model))


def write_run(folder: Path, source: Saved) -> Path:
    """A run folder with one checkpoint, as training leaves it: recipe, tokenizer, hashed weights."""
    step = folder / f"checkpoints/step_{source.step}"
    step.mkdir(parents=True)
    tensors = {}
    for name, tensor in source.weights.items():
        if ".experts." in name:
            tensors |= {f"weight/{name}[{e}]": part.clone() for e, part in enumerate(tensor)}
        else:
            tensors[f"weight/{name}"] = tensor
    save_file(tensors, step / "state.safetensors")
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return finish_run(folder, source.run, source.step, shapes)


def finish_run(folder: Path, run: RunConfig, number: int, shapes: dict[str, tuple[int, ...]]) -> Path:
    """All but the state.safetensors of the run's one checkpoint, which holds tensors of `shapes`."""
    from moe.checkpoint import folder as folders

    step = folders.step_folder(folder, number)
    (step / "recipe.yaml").write_text(dump(run))
    (folder / "recipe.yaml").write_text(dump(run))
    folders.write_manifest(
        step,
        folders.Manifest(
            step=number,
            next_sample=number * run.train.global_batch_size,
            tokens=0,
            layout=folders.Layout.of(run, 1),
            data_fingerprint="",
            files={
                path.name: folders.File(path.stat().st_size, folders.hash_file(path))
                for path in step.iterdir()
            },
            tensors={key: folders.Saved("state.safetensors", shape, None) for key, shape in shapes.items()},
        ),
    )
    write_tokenizer(folder / "tokenizer")
    return folder


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer of 97 tokens, the last one `<|endoftext|>`, in the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:96]
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {"<|endoftext|>": 96}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    page = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(page))
    return folder
