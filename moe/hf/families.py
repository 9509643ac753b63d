"""The one table of stock architectures: our switches, settings and names, and theirs on disk.

Rows say what, never how: the same row reads from ours to theirs and from theirs to ours. The names are those of the
files that every version of `transformers`, vLLM, SGLang and llama.cpp reads; where those are per expert, the fused
names that `transformers` 5 uses in memory never reach a disk.
"""

from collections.abc import Mapping

from moe.hf import names
from moe.hf.family import SET, Family, Name
from moe.hf.rope import rope
from moe.hf.settings import (
    ATTENTION_SCALE,
    HUNYUAN_SHARED,
    KV_HEADS,
    MLP_ONLY,
    MLP_TYPES,
    MUP_EMBEDDING,
    PREDICTION_DEPTH,
    SPARSE_RANGE,
    biases,
    groups,
    heads,
    query_key_norm,
    shared_experts,
)
from moe.hf.windows import QWEN_MOE_WINDOW, QWEN_WINDOWS, UNIFORM_WINDOW, layer_windows

_SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "attention.num_heads",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
_GROUPED = {
    **_SETTINGS,
    "num_key_value_heads": "attention.num_kv_heads",
    "head_dim": "attention.head_dim",
}
_DENSE = {"intermediate_size": "intermediate_size"}
_TOP_K = {"num_experts_per_tok": "moe.top_k"}
_NORMALIZE = {"norm_topk_prob": "moe.normalize_top_k"}
_LOCAL = {"num_local_experts": "moe.num_experts", "num_experts": "moe.num_experts"}
_NAMED = {"num_experts": "moe.num_experts", "num_local_experts": "moe.num_experts"}
_ROUTED = {"n_routed_experts": "moe.num_experts"}
_EXPERT_WIDTH = {"moe_intermediate_size": "moe.expert_intermediate_size"}
_EXPERT_WIDTH_ALONE = {"intermediate_size": "moe.expert_intermediate_size"}
_DEEPSEEK = {
    **_DENSE,
    **_EXPERT_WIDTH,
    **_ROUTED,
    **_TOP_K,
    "routed_scaling_factor": "moe.route_scale",
    "first_k_dense_replace": "moe.first_k_dense",
}
_MLA = {
    **_SETTINGS,
    "kv_lora_rank": "attention.latent.kv_rank",
    "q_lora_rank": "attention.latent.query_rank",
    "qk_nope_head_dim": "attention.latent.nope_head_dim",
    "qk_rope_head_dim": "attention.latent.rope_head_dim",
    "v_head_dim": "attention.latent.value_head_dim",
}
_CONSTANTS: Mapping[str, object] = {"hidden_act": "silu"}
_LLAMA_CONSTANTS = {**_CONSTANTS, "mlp_bias": False}

_BODY = (*names.BODY, *names.attention_biases())
_HEAD_NORMS = names.query_key_norms("head")
_FULL_NORMS = names.query_key_norms("full")
_SPARSE: Mapping[str, object] = {"moe": SET}
_SIGMOID: Mapping[str, object] = {"moe": SET, "moe.router_score": "sigmoid", "moe.selection_bias": True}
_CORRECTION = names.selection_bias("mlp.gate.e_score_correction_bias")
_DEEPSEEK_FFN = (*names.DENSE, *names.experts("mlp"), *names.shared("mlp.shared_experts"))
_LATENT = (*names.EMBEDDINGS, *names.PRE_NORMS, *names.LATENT_ATTENTION)
_PACKED = (
    names.linear("ffn.router", "block_sparse_moe.router.layer", "E D", "sparse"),
    Name(
        f"{names.OURS}ffn.experts.gate_up",
        (f"{names.LAYER}block_sparse_moe.input_linear.weight",),
        ("E", "2F", "D"),
        "sparse",
    ),
    Name(
        f"{names.OURS}ffn.experts.down",
        (f"{names.LAYER}block_sparse_moe.output_linear.weight",),
        ("E", "D", "F"),
        "sparse",
    ),
)
_PACKED_SHARED = names.swiglu_packed(
    "ffn.shared_expert", "shared_mlp.input_linear", "shared_mlp.output_linear"
)
_GPT_OSS_EXPERTS = (
    names.linear("ffn.router", "mlp.router", "E D", "sparse"),
    names.bias("ffn.router", "mlp.router", "E", "moe.router_bias", "sparse"),
    *(
        Name(
            f"{names.OURS}ffn.experts.{ours}",
            (f"{names.LAYER}mlp.experts.{disk}",),
            shape,
            "sparse",
            order=names.gate_up_rows if ours.startswith("gate") else None,
            transposed=len(shape) == 3,
        )
        for ours, disk, shape in (
            ("gate_up", "gate_up_proj", ("E", "2F", "D")),
            ("gate_up_bias", "gate_up_proj_bias", ("E", "2F")),
            ("down", "down_proj", ("E", "D", "F")),
            ("down_bias", "down_proj_bias", ("E", "D")),
        )
    ),
    Name(f"{names.OURS}attention.sinks", (f"{names.LAYER}self_attn.sinks",), ("H",)),
)
_GRANITE_SETTINGS = {
    **_GROUPED,
    **_TOP_K,
    **_LOCAL,
    **_EXPERT_WIDTH_ALONE,
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "logits_scaling": "logit_divisor",
}

DENSE_FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        "LlamaForCausalLM",
        needs={},
        names=(*_BODY, *names.DENSE),
        settings={**_GROUPED, **_DENSE},
        parts=(rope(), biases("attention_bias"), heads(divide=True)),
        constants={**_LLAMA_CONSTANTS, "pretraining_tp": 1},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        needs={"attention.qkv_bias": True},
        names=(*names.BODY, *names.attention_biases(output=False), *names.DENSE),
        settings={**_GROUPED, **_DENSE},
        parts=(rope(), QWEN_WINDOWS),
        constants=_CONSTANTS,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        needs={"attention.qk_norm": "head"},
        names=(*_BODY, *_HEAD_NORMS, *names.DENSE),
        settings={**_GROUPED, **_DENSE},
        parts=(rope(), biases("attention_bias"), QWEN_WINDOWS),
        constants=_CONSTANTS,
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        needs={"attention.qk_norm": "full", "norm_placement": "post"},
        names=(
            *names.EMBEDDINGS,
            *names.POST_NORMS,
            *names.attention(),
            *names.attention_biases(),
            *_FULL_NORMS,
            *names.DENSE,
        ),
        settings={**_GROUPED, **_DENSE},
        parts=(rope(), biases("attention_bias"), heads(fill=True)),
        constants=_CONSTANTS,
    ),
)
"""Dense architectures: sources of upcycling, and baselines."""

SPARSE_FAMILIES: tuple[Family, ...] = (
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        needs={**_SPARSE, "attention.qk_norm": "head"},
        names=(*_BODY, *_HEAD_NORMS, *names.DENSE, *names.experts("mlp")),
        settings={**_GROUPED, **_DENSE, **_EXPERT_WIDTH, **_NAMED, **_TOP_K, **_NORMALIZE},
        parts=(rope(), biases("attention_bias"), QWEN_MOE_WINDOW, MLP_ONLY),
        constants=_CONSTANTS,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        needs=_SPARSE,
        names=(*names.BODY, *names.experts("block_sparse_moe", "w1", "w3", "w2")),
        settings={**_GROUPED, **_LOCAL, **_TOP_K, **_EXPERT_WIDTH_ALONE},
        parts=(rope(), UNIFORM_WINDOW),
        constants=_CONSTANTS,
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        needs={**_SPARSE, "moe.shared_expert_gate": True, "moe.shared_expert_intermediate_size": SET},
        names=(
            *names.BODY,
            *names.attention_biases(output=False),
            *names.DENSE,
            *names.experts("mlp"),
            *names.shared("mlp.shared_expert", "mlp.shared_expert_gate"),
        ),
        settings={
            **_GROUPED,
            **_DENSE,
            **_EXPERT_WIDTH,
            **_NAMED,
            **_TOP_K,
            **_NORMALIZE,
            "shared_expert_intermediate_size": "moe.shared_expert_intermediate_size",
            "qkv_bias": "attention.qkv_bias",
        },
        parts=(rope(), QWEN_WINDOWS, MLP_ONLY, heads(fill=True)),  # 4.x reads no head_dim here
        constants=_CONSTANTS,
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        needs={**_SPARSE, "attention.qk_norm": "full"},
        names=(*_BODY, *_FULL_NORMS, *names.experts("mlp")),
        settings={
            **_GROUPED,
            **_NAMED,
            **_TOP_K,
            **_NORMALIZE,
            **_EXPERT_WIDTH_ALONE,
            "clip_qkv": "attention.clip_qkv",
        },
        parts=(rope(), biases("attention_bias"), heads(fill=True)),
        constants=_CONSTANTS,
    ),
    Family(
        "flex_olmo",
        "FlexOlmoForCausalLM",
        needs={**_SPARSE, "attention.qk_norm": "full", "norm_placement": "post"},
        names=(
            *names.EMBEDDINGS,
            *names.POST_NORMS,
            *names.attention(),
            *names.attention_biases(),
            *_FULL_NORMS,
            *names.experts("mlp"),
        ),
        settings={**_GROUPED, **_NAMED, **_TOP_K, **_NORMALIZE, **_EXPERT_WIDTH_ALONE},
        parts=(rope(), biases("attention_bias"), heads(fill=True)),
        constants=_CONSTANTS,
    ),
    Family(
        "phimoe",
        "PhimoeForCausalLM",
        needs={**_SPARSE, "norm": "layer", "moe.router_score": "sparsemixer", "moe.top_k": 2},
        names=(
            *_BODY,
            Name("norm.bias", ("model.norm.bias",), ("D",), "none"),
            Name("head.bias", ("lm_head.bias",), ("V",), "none", {"head_bias": True}),
            *names.norm_biases(
                ("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")
            ),
            *names.experts("block_sparse_moe", "w1", "w3", "w2"),
        ),
        settings={
            **_GROUPED,
            **_LOCAL,
            **_EXPERT_WIDTH_ALONE,
            "num_experts_per_tok": "moe.top_k",
            "router_jitter_noise": "moe.sparsemixer_margin",
            "lm_head_bias": "head_bias",
        },
        parts=(
            rope(kinds=("longrope",)),
            biases("attention_bias"),
            UNIFORM_WINDOW,
            heads(fill=True),
        ),
        constants=_CONSTANTS,
    ),
    Family(
        "granitemoe",
        "GraniteMoeForCausalLM",
        needs={**_SPARSE, "attention.scale": SET},
        names=(*_BODY, *_PACKED),
        settings=_GRANITE_SETTINGS,
        parts=(rope(), biases("attention_bias"), ATTENTION_SCALE, heads(fill=True)),
        constants=_CONSTANTS,
    ),
    Family(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        needs={**_SPARSE, "attention.scale": SET, "moe.shared_expert_intermediate_size": SET},
        names=(*_BODY, *_PACKED, *_PACKED_SHARED),
        settings={
            **_GRANITE_SETTINGS,
            "shared_intermediate_size": "moe.shared_expert_intermediate_size",
        },
        parts=(rope(), biases("attention_bias"), ATTENTION_SCALE, heads(fill=True)),
        constants=_CONSTANTS,
    ),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        needs={
            **_SPARSE,
            "attention.sinks": True,
            "moe.router_bias": True,
            "moe.expert_bias": True,
            "moe.expert_activation": "gpt_oss",
            "moe.activation_limit": SET,
        },
        names=(*_BODY, *_GPT_OSS_EXPERTS),
        settings={
            **_GROUPED,
            **_LOCAL,
            **_TOP_K,
            **_EXPERT_WIDTH_ALONE,
            "swiglu_limit": "moe.activation_limit",
            "swiglu_alpha": "moe.activation_alpha",
        },
        parts=(rope(), biases("attention_bias"), layer_windows(always=True)),
        constants=_CONSTANTS,
    ),
    Family(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        needs={**_SIGMOID, "attention.qk_norm": "full"},
        names=(
            *names.BODY,
            *_FULL_NORMS,
            *names.experts("block_sparse_moe", "w1", "w3", "w2"),
            names.selection_bias("block_sparse_moe.e_score_correction_bias"),
        ),
        settings={**_GROUPED, **_LOCAL, **_TOP_K, **_EXPERT_WIDTH_ALONE},
        parts=(rope(partial=True, rotary_dim=True),),
        constants={**_CONSTANTS, "use_qk_norm": True, "scoring_func": "sigmoid", "use_routing_bias": True},
    ),
    Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        needs={**_SPARSE, "moe.selection_bias": True},
        names=(
            *names.EMBEDDINGS,
            *names.PRE_NORMS,
            *names.attention(names.whole_head),
            *_DEEPSEEK_FFN,
            names.selection_bias("mlp.moe_statics.e_score_correction_bias", ("1", "E")),
        ),
        settings={
            **_GROUPED,
            **_DENSE,
            **_EXPERT_WIDTH,
            "moe_num_experts": "moe.num_experts",
            "moe_k": "moe.top_k",
        },
        parts=(
            rope(),
            SPARSE_RANGE,
            shared_experts("moe_num_shared_experts", "moe_intermediate_size"),
            heads(fill=True),
        ),
        constants={**_CONSTANTS, "use_bias": False, "moe_norm_min": 1e-12},
    ),
    Family(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        needs={
            **_SPARSE,
            "attention.qk_norm": "after_rotation",
            "moe.shared_expert_intermediate_size": SET,
        },
        names=(
            *_BODY,
            *names.query_key_norms("after_rotation", "query_layernorm", "key_layernorm"),
            *names.experts("mlp", router="gate.wg"),
            *names.shared("mlp.shared_mlp"),
        ),
        settings={
            **_GROUPED,
            **_EXPERT_WIDTH_ALONE,
            "num_experts": "moe.num_experts",
            "moe_topk": "moe.top_k",
        },
        parts=(rope(), biases("attention_bias"), HUNYUAN_SHARED),
        constants=_CONSTANTS,
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        needs={
            **_SPARSE,
            "attention.latent": SET,
            "moe.normalize_top_k": False,
            "moe.shared_expert_intermediate_size": SET,
        },
        names=(*_LATENT, *_DEEPSEEK_FFN),
        settings={**_MLA, **_DEEPSEEK},
        parts=(
            rope(),
            biases("attention_bias"),
            groups(method=True),
            shared_experts("n_shared_experts", "moe_intermediate_size", required=True),
            KV_HEADS,
        ),
        constants={**_LLAMA_CONSTANTS, "pretraining_tp": 1, "scoring_func": "softmax"},
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        needs={**_SIGMOID, "attention.latent": SET, "moe.shared_expert_intermediate_size": SET},
        names=(*_LATENT, *_DEEPSEEK_FFN, _CORRECTION, *names.PREDICTION),
        settings={**_MLA, **_DEEPSEEK, **_NORMALIZE},
        parts=(
            rope(),
            biases("attention_bias"),
            groups(),
            shared_experts("n_shared_experts", "moe_intermediate_size", required=True),
            KV_HEADS,
            PREDICTION_DEPTH,
        ),
        constants={
            **_CONSTANTS,
            "pretraining_tp": 1,
            "rope_interleave": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
    ),
    Family(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        needs={**_SIGMOID, "attention.latent": SET, "moe.shared_expert_intermediate_size": SET},
        names=(*_LATENT, *_DEEPSEEK_FFN, _CORRECTION, *names.PREDICTION),
        settings={
            **_MLA,
            **{key: path for key, path in _DEEPSEEK.items() if key != "first_k_dense_replace"},
            **_NORMALIZE,
        },
        parts=(
            rope(),
            biases("attention_bias"),
            groups(),
            shared_experts("n_shared_experts", "moe_intermediate_size", required=True),
            KV_HEADS,
            MLP_TYPES,
            PREDICTION_DEPTH,
        ),
        constants={**_CONSTANTS, "pretraining_tp": 1, "rope_interleave": True},
    ),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        needs={**_SIGMOID, "moe.shared_expert_intermediate_size": SET},
        names=(
            *names.BODY,
            *names.attention_biases(output=False),
            *_HEAD_NORMS,
            *_DEEPSEEK_FFN,
            _CORRECTION,
            *names.PREDICTION,
        ),
        settings={**_GROUPED, **_DEEPSEEK, **_NORMALIZE, "attention_bias": "attention.qkv_bias"},
        parts=(
            rope(partial=True),
            groups(),
            shared_experts("n_shared_experts", "moe_intermediate_size", required=True),
            query_key_norm("use_qk_norm"),
            PREDICTION_DEPTH,
        ),
        constants=_CONSTANTS,
    ),
    Family(
        "dots1",
        "Dots1ForCausalLM",
        needs={**_SIGMOID, "attention.qk_norm": "head", "moe.shared_expert_intermediate_size": SET},
        names=(*_BODY, *_HEAD_NORMS, *_DEEPSEEK_FFN, _CORRECTION),
        settings={**_GROUPED, **_DEEPSEEK, **_NORMALIZE},
        parts=(
            rope(),
            biases("attention_bias"),
            groups(),
            shared_experts("n_shared_experts", "moe_intermediate_size", required=True),
            layer_windows(),
        ),
        constants=_CONSTANTS,
    ),
    Family(
        "exaone_moe",
        "ExaoneMoeForCausalLM",
        needs={
            **_SIGMOID,
            "attention.qk_norm": "head",
            "attention.sliding_window": SET,
            "attention.rope_layers": "windowed",
            "moe.shared_expert_intermediate_size": SET,
        },
        names=(
            *names.BODY,
            *_HEAD_NORMS,
            *_DEEPSEEK_FFN,
            names.selection_bias("mlp.e_score_correction_bias"),
        ),
        settings={
            **_GROUPED,
            **_DENSE,
            **_EXPERT_WIDTH,
            "num_experts": "moe.num_experts",
            **_TOP_K,
            **_NORMALIZE,
            "routed_scaling_factor": "moe.route_scale",
        },
        parts=(
            rope(),
            groups(),
            shared_experts("num_shared_experts", "moe_intermediate_size", required=True),
            layer_windows(),
            MLP_TYPES,
        ),
        constants=_CONSTANTS,
    ),
    Family(
        "afmoe",
        "AfmoeForCausalLM",
        needs={
            **_SIGMOID,
            "attention.qk_norm": "head",
            "attention.output_gate": True,
            "attention.sliding_window": SET,
            "attention.rope_layers": "windowed",
            "norm_placement": "sandwich",
            "moe.shared_expert_intermediate_size": SET,
        },
        names=(
            *names.EMBEDDINGS,
            *names.norms(
                ("attention_norm", "input_layernorm"),
                ("attention_post_norm", "post_attention_layernorm"),
                ("ffn_norm", "pre_mlp_layernorm"),
                ("ffn_post_norm", "post_mlp_layernorm"),
            ),
            *names.attention(),
            *names.attention_biases(),
            names.linear("attention.gate", "self_attn.gate_proj", "Q D"),
            *_HEAD_NORMS,
            *names.DENSE,
            *names.experts("mlp", router="router.gate"),
            *names.shared("mlp.shared_experts"),
            names.selection_bias("mlp.expert_bias"),
        ),
        settings={
            **_GROUPED,
            **_DENSE,
            **_EXPERT_WIDTH,
            **_NAMED,
            **_TOP_K,
            "route_scale": "moe.route_scale",
            "num_dense_layers": "moe.first_k_dense",
        },
        parts=(
            rope(),
            biases("attention_bias"),
            shared_experts("num_shared_experts", "moe_intermediate_size", required=True),
            layer_windows(),
            MUP_EMBEDDING,
        ),
        constants=_CONSTANTS,
    ),
    Family(
        "solar_open",
        "SolarOpenForCausalLM",
        needs={**_SIGMOID, "moe.shared_expert_intermediate_size": SET},
        names=(
            *names.BODY,
            *names.attention_biases(output=False),
            *names.experts("mlp"),
            *names.shared("mlp.shared_experts"),
            _CORRECTION,
        ),
        settings={
            **_GROUPED,
            **_EXPERT_WIDTH,
            **_ROUTED,
            **_TOP_K,
            **_NORMALIZE,
            "routed_scaling_factor": "moe.route_scale",
            "attention_bias": "attention.qkv_bias",
        },
        parts=(
            rope(),
            groups(),
            shared_experts("n_shared_experts", "moe_intermediate_size", required=True),
        ),
        constants=_CONSTANTS,
    ),
)
"""Sparse architectures. Where a model meets the needs of two rows, the first takes it."""

FAMILIES = (*SPARSE_FAMILIES, *DENSE_FAMILIES)
"""Every stock architecture that we can read and write."""
