"""Settings of stock architectures that need more than a change of name: our switches <-> keys of config.json.

Pages are read as `transformers` 5 has normalised them, and written with both spellings of what it renamed.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from moe.config import ModelConfig
from moe.hf.family import Part

Page = Mapping[str, Any]


def biases(key: str) -> Part:
    """One key for the biases of all four projections of attention."""

    def lacking(model: ModelConfig) -> list[str]:
        given = model.attention.qkv_bias
        same = given == model.attention.output_bias
        return [] if same else [f"model.attention.output_bias={json.dumps(given)}"]

    return Part(
        keys=frozenset({key}),
        paths=frozenset({"attention.qkv_bias", "attention.output_bias"}),
        write=lambda model: {key: model.attention.qkv_bias},
        read=lambda page: dict.fromkeys(("attention.qkv_bias", "attention.output_bias"), bool(page[key])),
        lacking=lacking,
    )


def query_key_norm(key: str) -> Part:
    """A switch for norms of heads before the rotation."""
    path = "attention.qk_norm"
    return Part(
        keys=frozenset({key}),
        paths=frozenset({path}),
        write=lambda model: {key: model.attention.qk_norm == "head"},
        read=lambda page: {path: "head" if page[key] else "none"},
        lacking=lambda model: (
            [] if model.attention.qk_norm in ("head", "none") else ['model.attention.qk_norm="head"']
        ),
    )


def shared_experts(key: str, each: str, *, required: bool = False) -> Part:
    """A number of shared experts, all as wide as `each` of config.json, that work as one."""
    path = "moe.shared_expert_intermediate_size"

    def write(model: ModelConfig) -> dict[str, Any]:
        assert model.moe is not None
        return {key: (model.moe.shared_expert_intermediate_size or 0) // model.moe.expert_intermediate_size}

    def read(page: Page) -> dict[str, Any]:
        if required and not page[key]:
            raise ValueError(f"{key} is {page[key]}")
        return {path: page[each] * page[key] if page[key] else None}

    def lacking(model: ModelConfig) -> list[str]:
        assert model.moe is not None
        width, expert = model.moe.shared_expert_intermediate_size, model.moe.expert_intermediate_size
        if width is None:
            return [f"model.{path}={expert}"] if required else []
        return [] if width % expert == 0 else [f"model.{path}={expert * math.ceil(width / expert)}"]

    return Part(frozenset({key}), frozenset({path}), write, read, lacking)


def groups(method: bool = False) -> Part:
    """Blocks of experts; one block is none. `method`: a key says whether they count (DeepSeek-V2)."""
    paths = ("moe.num_expert_groups", "moe.top_k_groups")

    def write(model: ModelConfig) -> dict[str, Any]:
        assert model.moe is not None
        found = {"n_group": model.moe.num_expert_groups or 1, "topk_group": model.moe.top_k_groups or 1}
        limited = model.moe.num_expert_groups is not None
        return {**found, "topk_method": "group_limited_greedy" if limited else "greedy"} if method else found

    def read(page: Page) -> dict[str, Any]:
        if method and page["topk_method"] not in ("greedy", "group_limited_greedy"):
            raise ValueError(f"topk_method is {page['topk_method']}")
        if method and page["topk_method"] == "greedy":
            return dict.fromkeys(paths)
        if (page["n_group"] or 1) == 1:
            return dict.fromkeys(paths)
        score = "max" if method else "top2_sum"
        return {
            **dict(zip(paths, (page["n_group"], page["topk_group"]), strict=True)),
            "moe.group_score": score,
        }

    def lacking(model: ModelConfig) -> list[str]:
        assert model.moe is not None
        score = "max" if method else "top2_sum"
        if model.moe.num_expert_groups is None or model.moe.group_score == score:
            return []
        return [f'model.moe.group_score="{score}"']

    keys = {"n_group", "topk_group"} | ({"topk_method"} if method else set())
    return Part(frozenset(keys), frozenset({*paths, "moe.group_score"}), write, read, lacking)


def _dense_of(layers: list[int]) -> dict[str, Any]:
    """Numbers of dense layers -> those at the bottom, and the others."""
    first = next((count for count in range(len(layers)) if layers[count] != count), len(layers))
    return {"moe.first_k_dense": first, "moe.dense_layers": layers[first:]}


def _dense_layers(model: ModelConfig) -> list[int]:
    return [layer for layer in range(model.num_layers) if layer not in model.sparse_layers]


_DENSE_PATHS = frozenset({"moe.first_k_dense", "moe.dense_layers"})

MLP_ONLY = Part(
    keys=frozenset({"mlp_only_layers", "decoder_sparse_step"}),
    paths=_DENSE_PATHS,
    write=lambda model: {"mlp_only_layers": _dense_layers(model), "decoder_sparse_step": 1},
    read=lambda page: _dense_of(
        [
            layer
            for layer in range(page["num_hidden_layers"])
            if layer in page["mlp_only_layers"] or (layer + 1) % page["decoder_sparse_step"]
        ]
    ),
)
"""A list of dense layers (Qwen)."""


def _layer_types(model: ModelConfig) -> list[str]:
    dense = _dense_layers(model)
    return ["dense" if layer in dense else "sparse" for layer in range(model.num_layers)]


MLP_TYPES = Part(
    keys=frozenset({"mlp_layer_types", "first_k_dense_replace"}),
    paths=_DENSE_PATHS,
    write=lambda model: {
        "mlp_layer_types": _layer_types(model),
        "first_k_dense_replace": model.moe.first_k_dense if model.moe else 0,
    },
    read=lambda page: _dense_of([n for n, kind in enumerate(page["mlp_layer_types"]) if kind == "dense"]),
)
"""A word for each layer (GLM-4.7-Flash, EXAONE)."""


def _sparse_range(page: Page) -> dict[str, Any]:
    start, end, step = (page[f"moe_layer_{key}"] for key in ("start_index", "end_index", "interval"))
    layers = page["num_hidden_layers"]
    end = layers - 1 if end == -1 else end
    return _dense_of([n for n in range(layers) if (n + 1) % step or not start <= n <= end])


def _not_a_range(model: ModelConfig) -> list[str]:
    sparse = [n for n in model.sparse_layers if n < model.num_layers]
    whole = sparse == list(range(sparse[0], sparse[-1] + 1))
    return [] if whole else ["model.moe.dense_layers at the end only"]


SPARSE_RANGE = Part(
    keys=frozenset({"moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"}),
    paths=_DENSE_PATHS,
    write=lambda model: {
        "moe_layer_start_index": model.sparse_layers[0],
        "moe_layer_end_index": model.sparse_layers[-1],
        "moe_layer_interval": 1,
    },
    read=_sparse_range,
    lacking=_not_a_range,
)
"""The first and the last sparse layer (ERNIE 4.5)."""

KV_HEADS = Part(
    keys=frozenset({"num_key_value_heads", "head_dim", "qk_head_dim"}),
    paths=frozenset(),
    write=lambda model: {
        "num_key_value_heads": model.attention.num_heads,
        "head_dim": model.rotary_dim,
        "qk_head_dim": model.head_dim,
    },
    read=lambda page: {},
)
"""Key heads of latent attention are query heads; readers want them said."""


def _one_shared(page: Page) -> dict[str, Any]:
    if page["num_shared_expert"] != 1:
        raise ValueError(f"num_shared_expert is {page['num_shared_expert']}")
    return {"moe.shared_expert_intermediate_size": page["intermediate_size"]}


def _not_as_wide(model: ModelConfig) -> list[str]:
    assert model.moe is not None
    width = model.moe.expert_intermediate_size
    same = model.moe.shared_expert_intermediate_size == width
    return [] if same else [f"model.moe.shared_expert_intermediate_size={width}"]


HUNYUAN_SHARED = Part(
    keys=frozenset({"num_shared_expert"}),
    paths=frozenset({"moe.shared_expert_intermediate_size"}),
    write=lambda model: {"num_shared_expert": 1},
    read=_one_shared,
    lacking=_not_as_wide,
)
"""One shared expert, as wide as the others (Hunyuan)."""

MUP_EMBEDDING = Part(
    keys=frozenset({"mup_enabled"}),
    paths=frozenset({"embedding_multiplier"}),
    write=lambda model: {"mup_enabled": model.embedding_multiplier != 1},
    read=lambda page: {
        "embedding_multiplier": math.sqrt(page["hidden_size"]) if page["mup_enabled"] else 1.0
    },
    lacking=lambda model: (
        []
        if model.embedding_multiplier in (1, math.sqrt(model.hidden_size))
        else [f"model.embedding_multiplier={math.sqrt(model.hidden_size)}"]
    ),
)
"""Embeddings times the root of the width (AFMoE)."""

ATTENTION_SCALE = Part(
    keys=frozenset({"attention_multiplier"}),
    paths=frozenset({"attention.scale"}),
    write=lambda model: {"attention_multiplier": model.attention.scale or model.head_dim**-0.5},
    read=lambda page: {"attention.scale": float(page["attention_multiplier"])},
)
"""The factor on the logits of attention, always said (Granite)."""

PREDICTION_DEPTH = Part(
    keys=frozenset({"num_nextn_predict_layers"}),
    paths=frozenset({"prediction_depth"}),
    write=lambda model: {"num_nextn_predict_layers": model.prediction_depth},
    # Not all stock code knows the key, although the weights are released with modules (GLM-4.7-Flash).
    read=lambda page: {"prediction_depth": page.get("num_nextn_predict_layers") or 0},
)
"""Prediction modules (DeepSeek-V3)."""


def heads(*, divide: bool = False, fill: bool = False) -> Part:
    """What stock code asks of heads: that they divide the width, or that their widths add up to it."""

    def lacking(model: ModelConfig) -> list[str]:
        width, count = model.hidden_size, model.attention.num_heads
        if (divide or fill) and width % count:
            return [
                f"a model.hidden_size ({width}) that is a multiple of model.attention.num_heads ({count})"
            ]
        if fill and model.head_dim * count != width:
            return [f"model.attention.head_dim={width // count}"]
        return []

    nothing: Callable[[Any], dict[str, Any]] = lambda _: {}  # noqa: E731  (shorter than a def)
    return Part(frozenset(), frozenset(), nothing, nothing, lacking)
