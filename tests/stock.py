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
    *, qk_norm: bool | str = True, qkv_bias: bool = False, moe: dict[str, Any] | None = None, **changes: Any
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
    if moe is None or moe.get("first_k_dense") or moe.get("dense_layers"):
        settings["intermediate_size"] = 28
    attention = settings["attention"] | changes.pop("attention", {})
    return ModelConfig.model_validate({**settings, **changes, "attention": attention})


# All matrices of a sparse layer are square, and there are as many experts as columns: a transposition fits anywhere.
_SQUARE = {"hidden_size": 16, "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 4}}
_SQUARE_MOE = {"num_experts": 16, "top_k": 4, "expert_intermediate_size": 16}
_QUOTIENT = {"head_dim": 4}  # hidden_size / num_heads, which qwen2_moe has built in
_SHARED = {"shared_expert_intermediate_size": 36, "shared_expert_gate": True}

_BIASED = {"router_score": "sigmoid", "selection_bias": True}
_DEEPSEEK = {
    **_BIASED,
    "num_experts": 8,
    "num_expert_groups": 4,
    "top_k_groups": 2,
    "first_k_dense": 1,
    "shared_expert_intermediate_size": 40,
    "route_scale": 2.5,
}
_LATENT = {"kv_rank": 10, "query_rank": 14, "nope_head_dim": 6, "rope_head_dim": 4, "value_head_dim": 12}
_MLA = {"num_kv_heads": None, "head_dim": None, "num_heads": 6}
_GPT_OSS = {
    "router_bias": True,
    "expert_bias": True,
    "expert_activation": "gpt_oss",
    "activation_limit": 1.5,
}
_GPT_OSS_AROUND: dict[str, Any] = {
    "qk_norm": False,
    "qkv_bias": True,
    "attention": {
        "output_bias": True,
        "sinks": True,
        "sliding_window": 5,
        "window_layers": (0, 2),
        "rope_scaling": {
            "kind": "yarn",
            "factor": 4.0,
            "original_max_sequence_length": 24,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
    },
}

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
    "qwen2, windows": (
        "qwen2",
        model(qk_norm=False, qkv_bias=True, attention={"sliding_window": 5, "window_layers": (1, 2)}),
    ),
    "qwen3_moe, scattered dense layers, a window": (
        "qwen3_moe",
        model(moe={"dense_layers": (1,)}, attention={"sliding_window": 7}),
    ),
    "mixtral, a window": ("mixtral", model(moe={}, qk_norm=False, attention={"sliding_window": 5})),
    "llama, biases, stretched": (
        "llama",
        model(
            qk_norm=False,
            qkv_bias=True,
            attention={
                "output_bias": True,
                "rope_scaling": {
                    "kind": "llama3",
                    "factor": 8.0,
                    "low_frequency_factor": 1.0,
                    "high_frequency_factor": 4.0,
                    "original_max_sequence_length": 32,
                },
            },
        ),
    ),
    "olmo2": ("olmo2", model(qk_norm="full", norm_placement="post", attention=_QUOTIENT)),
    "olmoe": (
        "olmoe",
        model(moe={"normalize_top_k": False}, qk_norm="full", attention={**_QUOTIENT, "clip_qkv": 0.6}),
    ),
    "flex_olmo, square": (
        "flex_olmo",
        model(moe=_SQUARE_MOE, qk_norm="full", norm_placement="post", **_SQUARE),
    ),
    "phimoe": (
        "phimoe",
        model(
            moe={"router_score": "sparsemixer", "sparsemixer_margin": 0.3},
            qk_norm=False,
            qkv_bias=True,
            norm="layer",
            head_bias=True,
            attention={**_QUOTIENT, "output_bias": True},
        ),
    ),
    "granitemoe, square": (
        "granitemoe",
        model(
            moe=_SQUARE_MOE, qk_norm=False, **{**_SQUARE, "attention": {**_SQUARE["attention"], "scale": 0.3}}
        ),
    ),
    "granitemoeshared": (
        "granitemoeshared",
        model(
            moe={"shared_expert_intermediate_size": 36},
            qk_norm=False,
            embedding_multiplier=3.0,
            residual_multiplier=0.4,
            logit_divisor=2.5,
            attention={**_QUOTIENT, "scale": 0.3},
        ),
    ),
    "gpt_oss": ("gpt_oss", model(moe=_GPT_OSS, **_GPT_OSS_AROUND)),
    "gpt_oss, square": (
        "gpt_oss",
        model(
            moe={**_GPT_OSS, **_SQUARE_MOE},
            **{
                **_GPT_OSS_AROUND,
                **_SQUARE,
                "attention": {**_GPT_OSS_AROUND["attention"], **_SQUARE["attention"]},
            },
        ),
    ),
    "minimax_m2": ("minimax_m2", model(moe=_BIASED, qk_norm="full", attention={"rope_fraction": 0.5})),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        model(
            moe={"selection_bias": True, "first_k_dense": 1, "shared_expert_intermediate_size": 40},
            qk_norm=False,
            tie_embeddings=True,
            attention=_QUOTIENT,
        ),
    ),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe",
        model(moe={"shared_expert_intermediate_size": 20}, qk_norm="after_rotation"),
    ),
    "deepseek_v2": (
        "deepseek_v2",
        model(
            moe={
                "num_experts": 8,
                "normalize_top_k": False,
                "route_scale": 1.7,
                "first_k_dense": 1,
                "num_expert_groups": 4,
                "top_k_groups": 2,
                "group_score": "max",
                "shared_expert_intermediate_size": 40,
            },
            qk_norm=False,
            attention={**_MLA, "latent": {**_LATENT, "query_rank": None}},
        ),
    ),
    "deepseek_v3": (
        "deepseek_v3",
        model(moe=_DEEPSEEK, qk_norm=False, prediction_depth=1, attention={**_MLA, "latent": _LATENT}),
    ),
    "deepseek_v3, no groups, biases": (
        "deepseek_v3",
        model(
            moe={**_BIASED, "first_k_dense": 1, "shared_expert_intermediate_size": 20},
            qk_norm=False,
            qkv_bias=True,
            attention={**_MLA, "latent": _LATENT, "output_bias": True},
        ),
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        model(
            moe={**_BIASED, "dense_layers": (1,), "shared_expert_intermediate_size": 20},
            qk_norm=False,
            attention={**_MLA, "latent": _LATENT},
        ),
    ),
    "glm4_moe": (
        "glm4_moe",
        model(moe=_DEEPSEEK, qkv_bias=True, prediction_depth=1, attention={"rope_fraction": 0.5}),
    ),
    "dots1, windows": (
        "dots1",
        model(
            moe={**_BIASED, "first_k_dense": 1, "shared_expert_intermediate_size": 20},
            attention={"sliding_window": 5, "window_layers": (0, 2)},
        ),
    ),
    "exaone_moe": (
        "exaone_moe",
        model(
            moe={**_BIASED, "first_k_dense": 1, "shared_expert_intermediate_size": 20},
            attention={"sliding_window": 5, "window_layers": (0, 2), "rope_layers": "windowed"},
        ),
    ),
    "afmoe": (
        "afmoe",
        model(
            moe={**_BIASED, "first_k_dense": 1, "route_scale": 1.3, "shared_expert_intermediate_size": 40},
            norm_placement="sandwich",
            embedding_multiplier=24**0.5,
            attention={
                "sliding_window": 5,
                "window_layers": (0, 2),
                "rope_layers": "windowed",
                "output_gate": True,
            },
        ),
    ),
    "solar_open": (
        "solar_open",
        model(
            moe={**_BIASED, "shared_expert_intermediate_size": 20},
            qk_norm=False,
            architecture="solar_open",
        ),
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
        if model.moe.selection_bias:
            page["balance"]["bias_update_rate"] = 0.001
    return RunConfig.model_validate(page)


def random_weights(model: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Logical names -> float32; wide enough that a misplaced matrix moves every logit."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for move in moves(family_of(model), model):
        if move.copy:
            continue
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
