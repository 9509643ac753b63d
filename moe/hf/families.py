"""The one table of stock architectures: our switches, settings and names, and theirs on disk.

Rows say what, never how: the same row reads from ours to theirs and from theirs to ours. Nothing is transposed
anywhere. The names are those of the per-expert files that every version of `transformers`, vLLM, SGLang and
llama.cpp reads; the fused names that `transformers` 5 uses in memory never reach a disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from moe.config import ModelConfig


@dataclass(frozen=True)
class Name:
    """A logical tensor of ours and the disk tensors that hold its rows.

    `{layer}` runs over `layers`, `{expert}` over dimension 0 of ours; several disk names are equal blocks of the
    rows of one matrix, in order (gate above up).
    """

    ours: str
    disk: tuple[str, ...]
    shape: tuple[str, ...]
    """Dimensions of ours, in the letters of `sizes`."""
    layers: Literal["none", "all", "dense", "sparse"] = "all"
    only_untied: bool = False


@dataclass(frozen=True)
class Family:
    """A stock architecture: what it needs of a model, and how it spells it."""

    model_type: str
    architecture: str
    needs: Mapping[str, object]
    """Path in our model section -> the value that this architecture has built in; `SET` for any but null."""
    names: tuple[Name, ...]
    settings: Mapping[str, str]
    """Key in config.json -> path in our model section."""
    constants: Mapping[str, object]
    """Keys in config.json whose value follows from the row alone."""
    heads: Literal["any", "divide the width", "fill the width"] = "any"
    """What stock code asks of heads: num_heads divides hidden_size, or head_dim is their quotient and no other."""


SET = object()
"""Any value but null."""


def sizes(model: ModelConfig) -> dict[str, int]:
    """Dimension letters -> sizes; letters of absent parts are left out."""
    found = {
        "V": model.vocab_size,
        "D": model.hidden_size,
        "Q": model.attention.num_heads * model.head_dim,
        "K": model.num_kv_heads * model.head_dim,
        "h": model.head_dim,
        "1": 1,
    }
    if model.intermediate_size is not None:
        found["I"] = model.intermediate_size
    if model.moe is not None:
        found |= {
            "E": model.moe.num_experts,
            "F": model.moe.expert_intermediate_size,
            "2F": 2 * model.moe.expert_intermediate_size,
        }
        if model.moe.shared_expert_intermediate_size is not None:
            found["S"] = model.moe.shared_expert_intermediate_size
    return found


def setting(model: ModelConfig, path: str) -> Any:
    """The value at a dotted path of the model section; None below an absent block."""
    return reduce(lambda here, key: None if here is None else getattr(here, key), path.split("."), model)


_LAYER = "model.layers.{layer}."


def _linear(ours: str, disk: str, shape: str, layers: Literal["all", "dense", "sparse"] = "all") -> Name:
    return Name(f"layers.{{layer}}.{ours}.weight", (f"{_LAYER}{disk}.weight",), tuple(shape.split()), layers)


def _bias(ours: str, disk: str, shape: str) -> Name:
    return Name(f"layers.{{layer}}.{ours}.bias", (f"{_LAYER}{disk}.bias",), (shape,))


def _swiglu(ours: str, disk: str, width: str, layers: Literal["dense", "sparse"]) -> tuple[Name, ...]:
    return (
        _linear(f"{ours}.gate", f"{disk}.gate_proj", f"{width} D", layers),
        _linear(f"{ours}.up", f"{disk}.up_proj", f"{width} D", layers),
        _linear(f"{ours}.down", f"{disk}.down_proj", f"D {width}", layers),
    )


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Name, ...]:
    each = f"{_LAYER}{block}.experts.{{expert}}."
    ours = "layers.{layer}.ffn.experts."
    return (
        _linear("ffn.router", f"{block}.gate", "E D", "sparse"),
        Name(ours + "gate_up", (f"{each}{gate}.weight", f"{each}{up}.weight"), ("E", "2F", "D"), "sparse"),
        Name(ours + "down", (f"{each}{down}.weight",), ("E", "D", "F"), "sparse"),
    )


_BODY = (
    Name("embed.weight", ("model.embed_tokens.weight",), ("V", "D"), "none"),
    Name("norm.weight", ("model.norm.weight",), ("D",), "none"),
    Name("head.weight", ("lm_head.weight",), ("V", "D"), "none", only_untied=True),
    _linear("attention_norm", "input_layernorm", "D"),
    _linear("attention.query", "self_attn.q_proj", "Q D"),
    _linear("attention.key", "self_attn.k_proj", "K D"),
    _linear("attention.value", "self_attn.v_proj", "K D"),
    _linear("attention.output", "self_attn.o_proj", "D Q"),
    _linear("ffn_norm", "post_attention_layernorm", "D"),
)
_QK_NORM = (
    _linear("attention.query_norm", "self_attn.q_norm", "h"),
    _linear("attention.key_norm", "self_attn.k_norm", "h"),
)
_QKV_BIAS = (
    _bias("attention.query", "self_attn.q_proj", "Q"),
    _bias("attention.key", "self_attn.k_proj", "K"),
    _bias("attention.value", "self_attn.v_proj", "K"),
)
_DENSE = _swiglu("ffn", "mlp", "I", "dense")
_QWEN_EXPERTS = _experts("mlp", "gate_proj", "up_proj", "down_proj")
_GATED_SHARED_EXPERT = (
    *_swiglu("ffn.shared_expert", "mlp.shared_expert", "S", "sparse"),
    _linear("ffn.shared_expert_gate", "mlp.shared_expert_gate", "1 D", "sparse"),
)

_SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "attention.num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "attention.rope_theta",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
_DENSE_SETTINGS = {**_SETTINGS, "intermediate_size": "intermediate_size"}
_SPARSE_SETTINGS = {**_SETTINGS, "num_experts": "moe.num_experts", "num_experts_per_tok": "moe.top_k"}
_QWEN_MOE_SETTINGS = {
    **_SPARSE_SETTINGS,
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe.expert_intermediate_size",
    "norm_topk_prob": "moe.normalize_top_k",
}

_CONSTANTS: dict[str, object] = {"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True}
_NO_WINDOW = {**_CONSTANTS, "use_sliding_window": False, "sliding_window": None}
_ROUTED = {"decoder_sparse_step": 1, "output_router_logits": False}

_PLAIN_EXPERTS: dict[str, object] = {
    "moe.expert_activation": "swiglu",
    "moe.activation_limit": None,
    "moe.expert_bias": False,
    "moe.latent_size": None,
}
_SOFTMAX_CHOICE: dict[str, object] = {
    **_PLAIN_EXPERTS,
    "moe.router_choice": "token",
    "moe.router_score": "softmax",
    "moe.route_scale": 1.0,
    "moe.num_expert_groups": None,
    "moe.selection_bias": False,
}

FAMILIES = (
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        needs={
            "moe": SET,
            **_SOFTMAX_CHOICE,
            "attention.qk_norm": True,
            "attention.qkv_bias": False,
            "moe.shared_expert_intermediate_size": None,
        },
        names=(*_BODY, *_QK_NORM, *_DENSE, *_QWEN_EXPERTS),
        settings={**_QWEN_MOE_SETTINGS, "num_local_experts": "moe.num_experts"},
        constants={**_NO_WINDOW, **_ROUTED, "attention_bias": False},
    ),
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        needs={
            "moe": SET,
            **_SOFTMAX_CHOICE,
            "attention.qk_norm": False,
            "attention.qkv_bias": False,
            "moe.normalize_top_k": True,
            "moe.first_k_dense": 0,
            "moe.shared_expert_intermediate_size": None,
        },
        names=(*_BODY, *_experts("block_sparse_moe", gate="w1", up="w3", down="w2")),
        settings={
            **_SPARSE_SETTINGS,
            "num_local_experts": "moe.num_experts",
            "intermediate_size": "moe.expert_intermediate_size",
        },
        constants={
            **_CONSTANTS,
            "sliding_window": None,
            "output_router_logits": False,
            "router_jitter_noise": 0.0,
        },
    ),
    Family(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        needs={
            "moe": SET,
            **_SOFTMAX_CHOICE,
            "attention.qk_norm": False,
            "attention.qkv_bias": True,
            "moe.shared_expert_intermediate_size": SET,
            "moe.shared_expert_gate": True,
        },
        names=(*_BODY, *_QKV_BIAS, *_DENSE, *_QWEN_EXPERTS, *_GATED_SHARED_EXPERT),
        settings={
            **_QWEN_MOE_SETTINGS,
            "shared_expert_intermediate_size": "moe.shared_expert_intermediate_size",
            "max_window_layers": "num_layers",
        },
        constants={**_NO_WINDOW, **_ROUTED, "qkv_bias": True},
        heads="fill the width",  # 4.x reads no head_dim here
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        needs={"moe": None, "attention.qk_norm": True, "attention.qkv_bias": False},
        names=(*_BODY, *_QK_NORM, *_DENSE),
        settings={**_DENSE_SETTINGS, "max_window_layers": "num_layers"},
        constants={**_NO_WINDOW, "attention_bias": False},
    ),
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        needs={"moe": None, "attention.qk_norm": False, "attention.qkv_bias": False},
        names=(*_BODY, *_DENSE),
        settings=_DENSE_SETTINGS,
        constants={**_CONSTANTS, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
        heads="divide the width",  # 5.x refuses any other config
    ),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        needs={"moe": None, "attention.qk_norm": False, "attention.qkv_bias": True},
        names=(*_BODY, *_QKV_BIAS, *_DENSE),
        settings={**_DENSE_SETTINGS, "max_window_layers": "num_layers"},
        constants=_NO_WINDOW,
    ),
)
"""Every stock architecture we can write; a model fits one row at most."""
