"""Tiny settings of every stock architecture, several each, and the random models that stock code makes of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class StockCase:
    """What `AutoConfig.for_model` is given."""

    model_type: str
    settings: Settings
    slow: bool = False
    """Whether it says little that others do not."""


_PLAIN: Settings = {"rope_type": "default", "rope_theta": 1234.0}
_LINEAR: Settings = {"rope_type": "linear", "rope_theta": 1234.0, "factor": 3.0}
_LLAMA3: Settings = {
    "rope_type": "llama3",
    "rope_theta": 1234.0,
    "factor": 6.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN: Settings = {
    "rope_type": "yarn",
    "rope_theta": 1234.0,
    "factor": 3.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 24.0,
    "beta_slow": 2.0,
}
_COMMON: Settings = {
    "vocab_size": 112,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 3e-5,
    "rope_parameters": _PLAIN,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 96,
}
"""Sizes differ from one another, and settings from stock defaults. A padding token would have no gradient."""
_WIDE_HEADS: Settings = {**_COMMON, "head_dim": 8}
"""Heads that are together wider than the model."""
_DENSE: Settings = {"intermediate_size": 28}
_EXPERTS: Settings = {"num_experts": 5, "num_experts_per_tok": 2}
_LOCAL: Settings = {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 20}
_NAMED: Settings = {**_EXPERTS, **_DENSE, "moe_intermediate_size": 20}
_ROUTED: Settings = {
    **_DENSE,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "n_group": 1,
    "topk_group": 1,
}
_GROUPS: Settings = {"n_group": 4, "topk_group": 2}
_LATENT: Settings = {
    **{key: value for key, value in _COMMON.items() if key != "num_key_value_heads"},
    "num_key_value_heads": 6,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
}
_SCATTERED: Settings = {
    "num_hidden_layers": 4,
    "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
    "first_k_dense_replace": 1,
}

# Matrices are square and experts as many as columns: a transposition, or a swap of experts and rows, fits anywhere.
_SQUARE: Settings = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4}
_SQUARE_FILL: Settings = {key: value for key, value in _SQUARE.items() if key != "head_dim"}
_SQUARE_DENSE: Settings = {"intermediate_size": 16}
_SQUARE_LOCAL: Settings = {"num_local_experts": 16, "num_experts_per_tok": 4, **_SQUARE_DENSE}
_SQUARE_NAMED: Settings = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    **_SQUARE_DENSE,
}
_SQUARE_ROUTED: Settings = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    **_SQUARE_DENSE,
}
_SQUARE_LATENT: Settings = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 2,
    **_SQUARE_ROUTED,
}
_FUSED_SQUARE: Settings = {**_SQUARE_LOCAL, "intermediate_size": 8}
"""Gate and up together as wide as the model, where they are one matrix on disk."""

_TIED: Settings = {"tie_word_embeddings": True}
_BIASED: Settings = {"attention_bias": True}
_SOME_WINDOWS: Settings = {
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_ALL_WINDOWS: Settings = {"sliding_window": 7, "layer_types": ["sliding_attention"] * 3}
_NO_WINDOWS: Settings = {"layer_types": ["full_attention"] * 3}
_SLOW = {"all at once", "wide window"}
"""Names of cases that only `slow` tests run."""


def _of(model_type: str, base: Settings, **changes: Settings) -> dict[str, StockCase]:
    """The architecture as it is, and with changes, a name each (underscores stand for spaces)."""
    cases = {model_type: StockCase(model_type, base)}
    for name, change in changes.items():
        spoken = name.replace("_", " ")
        cases[f"{model_type}, {spoken}"] = StockCase(model_type, {**base, **change}, spoken in _SLOW)
    return cases


CASES: dict[str, StockCase] = {
    **_of(
        "llama",
        {**_WIDE_HEADS, **_DENSE},
        square_tied={**_SQUARE, **_SQUARE_DENSE, **_TIED},
        llama3_biased={"rope_parameters": _LLAMA3, **_BIASED},
        linear={"rope_parameters": _LINEAR},
        yarn={"rope_parameters": {**_YARN, "attention_factor": 1.25}},
        all_at_once={"rope_parameters": _YARN, **_BIASED, **_TIED, "num_key_value_heads": 1},
    ),
    **_of(
        "qwen2",
        {**_COMMON, **_DENSE},
        square_tied={**_SQUARE_FILL, **_SQUARE_DENSE, **_TIED},
        windows_above={"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        wide_window={"use_sliding_window": True, "sliding_window": 77, "max_window_layers": 0},
    ),
    **_of(
        "qwen3",
        {**_WIDE_HEADS, **_DENSE},
        square_tied={**_SQUARE, **_SQUARE_DENSE, **_TIED},
        biased_yarn={**_BIASED, "rope_parameters": _YARN},
        window={"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
        all_at_once={**_BIASED, **_TIED, "use_sliding_window": True, **_SOME_WINDOWS},
    ),
    **_of(
        "olmo2",
        {**_COMMON, **_DENSE},
        square_tied={**_SQUARE_FILL, **_SQUARE_DENSE, **_TIED},
        biased=_BIASED,
        linear={"rope_parameters": _LINEAR},
    ),
    **_of(
        "mixtral",
        {**_WIDE_HEADS, **_LOCAL},
        square_tied={**_SQUARE, **_SQUARE_LOCAL, **_TIED},
        window={"sliding_window": 7, "rope_parameters": _LLAMA3},
        narrow_heads={"head_dim": None, "num_experts_per_tok": 5},
        wide_window={"sliding_window": 40},
    ),
    **_of(
        "qwen2_moe",
        {**_COMMON, **_NAMED, "shared_expert_intermediate_size": 36, "norm_topk_prob": True},
        square_tied={
            **_SQUARE_FILL,
            **_SQUARE_NAMED,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [1],
            **_TIED,
        },
        unbiased={"qkv_bias": False, "norm_topk_prob": False},
        every_second_sparse={"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
        windows_above={"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        window={"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
        one_expert={"num_experts_per_tok": 1, "norm_topk_prob": False, "rope_parameters": _YARN},
    ),
    **_of(
        "qwen3_moe",
        {**_WIDE_HEADS, **_NAMED, "norm_topk_prob": True},
        square_tied={**_SQUARE, **_SQUARE_NAMED, "mlp_only_layers": [0], **_TIED},
        not_normalised={"norm_topk_prob": False, **_BIASED},
        scattered_dense={"num_hidden_layers": 4, "mlp_only_layers": [0, 2], "rope_parameters": _LLAMA3},
        window={"use_sliding_window": True, "sliding_window": 7, "rope_parameters": _YARN},
        all_at_once={
            **_BIASED,
            **_TIED,
            "mlp_only_layers": [2],
            "num_experts_per_tok": 1,
            "norm_topk_prob": False,
        },
    ),
    **_of(
        "olmoe",
        {**_COMMON, **_EXPERTS, "intermediate_size": 20},
        square_tied={**_SQUARE_FILL, "num_experts": 16, **_SQUARE_DENSE, **_TIED},
        clipped={"clip_qkv": 0.6, "norm_topk_prob": True},
        biased={**_BIASED, "rope_parameters": _LINEAR},
    ),
    **_of(
        "flex_olmo",
        {**_COMMON, **_EXPERTS, "intermediate_size": 20},
        square_tied={**_SQUARE_FILL, "num_experts": 16, **_SQUARE_DENSE, **_TIED},
        normalised_biased={"norm_topk_prob": True, **_BIASED, "rope_parameters": _YARN},
    ),
    **_of(
        "phimoe",
        {**_COMMON, **_LOCAL, "router_jitter_noise": 0.2},
        longrope={
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1234.0,
                "short_factor": [1.0, 1.3],
                "long_factor": [1.0, 4.0],
                "short_mscale": 1.1,
                "long_mscale": 1.3,
                "original_max_position_embeddings": 48,
            },
        },
        square={**_SQUARE_FILL, **_SQUARE_LOCAL, "num_experts_per_tok": 2},
        tied=_TIED,
        biased_window={
            **_BIASED,
            "lm_head_bias": True,
            "sliding_window": 7,
            "router_jitter_noise": 0.4,
        },
    ),
    **_of(
        "granitemoe",
        {**_COMMON, **_LOCAL, "attention_multiplier": 0.3},
        square_tied={**_SQUARE_FILL, **_SQUARE_LOCAL, **_TIED},
        fused_square={**_SQUARE_FILL, **_FUSED_SQUARE},
        multiplied={
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
            **_BIASED,
            "rope_parameters": _YARN,
        },
    ),
    **_of(
        "granitemoeshared",
        {**_COMMON, **_LOCAL, "attention_multiplier": 0.3, "shared_intermediate_size": 36},
        square_tied={**_SQUARE_FILL, **_SQUARE_LOCAL, "shared_intermediate_size": 16, **_TIED},
        fused_square={**_SQUARE_FILL, **_FUSED_SQUARE, "shared_intermediate_size": 8},
        multiplied={
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
            **_BIASED,
            "rope_parameters": _LINEAR,
        },
    ),
    **_of(
        "gpt_oss",
        {**_WIDE_HEADS, **_LOCAL, **_SOME_WINDOWS},
        square={**_SQUARE, **_SQUARE_LOCAL},
        fused_square_tied={**_SQUARE, **_FUSED_SQUARE, **_TIED},
        yarn={"rope_parameters": {**_YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}},
        capped={"swiglu_limit": 0.5, "swiglu_alpha": 1.2},
        unbiased_everywhere_windowed={**_ALL_WINDOWS, "attention_bias": False},
        no_window={**_NO_WINDOWS, "num_key_value_heads": 6},
    ),
    **_of(
        "minimax_m2",
        {**_WIDE_HEADS, **_LOCAL, "rope_parameters": {**_PLAIN, "partial_rotary_factor": 0.5}},
        square_tied={**_SQUARE, **_SQUARE_LOCAL, **_TIED},
        whole_heads_rotated={"rope_parameters": {**_PLAIN, "partial_rotary_factor": 1.0}},
        yarn={"rope_parameters": {**_YARN, "partial_rotary_factor": 0.5}},
    ),
    **_of(
        "ernie4_5_moe",
        {
            **_COMMON,
            **_DENSE,
            "moe_intermediate_size": 20,
            "moe_num_experts": 5,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "tie_word_embeddings": False,
        },
        square_tied={
            **_SQUARE_FILL,
            **_SQUARE_DENSE,
            "moe_intermediate_size": 16,
            "moe_num_experts": 16,
            "moe_k": 4,
            "moe_num_shared_experts": 1,
            **_TIED,
        },
        nothing_shared={"moe_num_shared_experts": 0, "moe_layer_start_index": 0},
        dense_at_both_ends={
            "num_hidden_layers": 4,
            "moe_layer_end_index": 2,
            "rope_parameters": _LINEAR,
        },
    ),
    **_of(
        "hunyuan_v1_moe",
        {
            **_WIDE_HEADS,
            "num_experts": 5,
            "moe_topk": 2,
            "intermediate_size": 20,
            "num_shared_expert": 1,
        },
        square_tied={**_SQUARE, **_SQUARE_DENSE, "num_experts": 16, "moe_topk": 4, **_TIED},
        biased={**_BIASED, "rope_parameters": _YARN},
    ),
    **_of(
        "deepseek_v2",
        {**_LATENT, **_ROUTED},
        square_tied={**_SQUARE_LATENT, **_TIED},
        groups={**_GROUPS, "topk_method": "group_limited_greedy", **_BIASED},
        queries_from_the_input={"q_lora_rank": None, "first_k_dense_replace": 0},
        yarn={"rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
        yarn_apart={"rope_parameters": {**_YARN, "mscale": 1.2, "mscale_all_dim": 0.6}},
        yarn_unscaled={"rope_parameters": _YARN},
    ),
    **_of(
        "deepseek_v3",
        {**_LATENT, **_ROUTED, **_GROUPS},
        square_tied={**_SQUARE_LATENT, **_TIED},
        one_group_not_normalised={"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        queries_from_the_input={"q_lora_rank": None, "first_k_dense_replace": 0, **_BIASED},
        yarn={"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, **_BIASED},
    ),
    **_of(
        "glm4_moe_lite",
        {**_LATENT, **_ROUTED, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        square_tied={**_SQUARE_LATENT, **_TIED},
        scattered_dense={**_SCATTERED, **_GROUPS},
        queries_from_the_input={"q_lora_rank": None, "mlp_layer_types": ["sparse"] * 3, **_BIASED},
        yarn={"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.8}, "norm_topk_prob": False},
    ),
    **_of(
        "glm4_moe",
        {
            **_WIDE_HEADS,
            **_ROUTED,
            "use_qk_norm": True,
            "rope_parameters": {**_PLAIN, "partial_rotary_factor": 0.5},
        },
        square_tied={**_SQUARE, **_SQUARE_ROUTED, **_TIED},
        groups_biased={**_GROUPS, **_BIASED, "use_qk_norm": False, "norm_topk_prob": False},
        first_two_dense={
            "first_k_dense_replace": 2,
            "rope_parameters": {**_LINEAR, "partial_rotary_factor": 1.0},
        },
    ),
    **_of(
        "dots1",
        {**_WIDE_HEADS, **_ROUTED, "norm_topk_prob": True, **_NO_WINDOWS},
        square_tied={**_SQUARE, **_SQUARE_ROUTED, **_TIED},
        groups_windows={**_GROUPS, **_SOME_WINDOWS, "norm_topk_prob": False},
        biased_everywhere_windowed={**_BIASED, **_ALL_WINDOWS, "first_k_dense_replace": 0},
    ),
    **_of(
        "solar_open",
        {**_WIDE_HEADS, **{key: value for key, value in _ROUTED.items() if "dense" not in key}},
        square_tied={**_SQUARE, **_SQUARE_ROUTED, **_TIED},
        groups_biased={**_GROUPS, **_BIASED},
        yarn={"rope_parameters": _YARN, "norm_topk_prob": False},
    ),
    **_of(
        "exaone_moe",
        {
            **_WIDE_HEADS,
            **_NAMED,
            "num_experts": 8,
            "num_shared_experts": 2,
            "routed_scaling_factor": 1.7,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            **_SOME_WINDOWS,
        },
        square_tied={**_SQUARE, **_SQUARE_NAMED, "num_shared_experts": 1, **_TIED},
        scattered_dense={
            **_SCATTERED,
            **_GROUPS,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "norm_topk_prob": False,
        },
        everywhere_windowed={**_ALL_WINDOWS, "rope_parameters": _LLAMA3},
    ),
    **_of(
        "afmoe",
        {
            **_WIDE_HEADS,
            **_NAMED,
            "num_shared_experts": 2,
            "num_dense_layers": 1,
            "route_scale": 1.7,
            "mup_enabled": True,
            **_SOME_WINDOWS,
        },
        square_tied={**_SQUARE, **_SQUARE_NAMED, "num_shared_experts": 1, **_TIED},
        biased={**_BIASED, "mup_enabled": False, "num_dense_layers": 0},
        everywhere_windowed={**_ALL_WINDOWS, "num_dense_layers": 2, "rope_parameters": _LINEAR},
    ),
}
"""What it shows -> settings."""


def stock_model(case: StockCase, seed: int = 0) -> Any:
    """A stock model in evaluation mode whose weights, float32, are wide enough that a misplaced one shows."""
    import transformers

    settings = {
        key: dict(value) if key == "rope_parameters" else value for key, value in case.settings.items()
    }
    config = transformers.AutoConfig.for_model(case.model_type, **settings)
    # The plain loop over experts: the fused kernel refuses some widths.
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    fill(model, seed)
    return model.eval()


def fill(module: Any, seed: int) -> None:
    """Random parameters and selection biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(drawn + 1.0 if "norm" in name and name.endswith("weight") else drawn)
        for name, buffer in module.named_buffers():
            if name.endswith("bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)


def stock_folder(case: StockCase, folder: Path, seed: int = 0) -> Any:
    """The model, saved by stock code in the folder."""
    model = stock_model(case, seed)
    model.save_pretrained(folder)
    return model
