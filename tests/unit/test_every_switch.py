"""No switch of a model is lost on export: every setting, changed, is written down differently or refused.

A row of the table that forgets a switch would take the model for another one, with healthy-looking files.
"""

from typing import Any

import pytest
import torch

from moe.config import AttentionConfig, ModelConfig, MoEConfig
from moe.config.attention import RopeScaling
from moe.config.shape import shape_faults
from moe.errors import ExportError
from moe.hf.convert import moves
from moe.hf.match import check_exportable, family_of
from moe.hf.pages import SpecialTokens, config_page
from moe.model import Transformer
from tests.stock import CASES, model

Changes = dict[str, Any]

# Setting -> (what must be there for it to have an effect, values that differ from every case of tests/stock.py).
MOE: dict[str, tuple[Changes, list[Any]]] = {
    "num_experts": ({}, [7]),
    "top_k": ({}, [3]),
    "expert_intermediate_size": ({}, [44]),
    "expert_activation": ({}, ["gpt_oss"]),
    "activation_alpha": ({"expert_activation": "gpt_oss"}, [1.25]),
    "activation_limit": ({}, [7.0]),
    "expert_bias": ({}, [True]),
    "latent_size": ({}, [12]),
    "router_score": ({}, ["sigmoid"]),
    "sparsemixer_margin": ({"router_score": "sparsemixer", "sparsemixer_margin": 0.1}, [0.25]),
    "router_bias": ({}, [True, False]),
    "router_choice": ({}, ["expert", "round_robin"]),
    "normalize_top_k": ({}, [True, False]),
    "route_scale": ({}, [2.5]),
    "num_expert_groups": ({"top_k_groups": 1}, [4, 2]),
    "top_k_groups": ({"num_expert_groups": 4, "top_k_groups": 2}, [3]),
    "group_score": ({"num_expert_groups": 2, "top_k_groups": 1}, ["max"]),
    "selection_bias": ({}, [True]),
    "first_k_dense": ({}, [0, 1]),
    "dense_layers": ({}, [(2,), (0, 2)]),
    "shared_expert_intermediate_size": ({}, [None, 52]),
    "shared_expert_gate": ({"shared_expert_intermediate_size": 36}, [True, False]),
}
ATTENTION: dict[str, tuple[Changes, list[Any]]] = {
    "num_heads": ({}, [2, 12]),
    "num_kv_heads": ({}, [1]),
    "head_dim": ({}, [10]),
    "qk_norm": ({}, [True, False]),
    "qkv_bias": ({}, [True, False]),
    "output_bias": ({}, [True, False]),
    "clip_qkv": ({}, [0.7]),
    "rope_theta": ({}, [4321.0]),
    "rope_fraction": ({}, [0.25]),
    "rope_scaling": ({}, [RopeScaling(kind="linear", factor=2.0), None]),
    "rope_layers": ({"sliding_window": 9}, ["all", "windowed"]),
    "sliding_window": ({}, [9, None]),
    "window_layers": ({"sliding_window": 9}, [(1,), None]),
    "sinks": ({}, [True, False]),
    "output_gate": ({}, [True, False]),
    "scale": ({}, [0.4, None]),
    "latent": ({}, [None]),
}
WHOLE: dict[str, tuple[Changes, list[Any]]] = {
    "vocab_size": ({}, [113]),
    "hidden_size": ({}, [48]),
    "num_layers": ({}, [4]),
    "intermediate_size": ({}, [52]),
    "max_sequence_length": ({}, [128]),
    "norm": ({}, ["rms", "layer"]),
    "norm_placement": ({}, ["pre", "post", "sandwich"]),
    "norm_eps": ({}, [2e-5]),
    "tie_embeddings": ({}, [True, False]),
    "head_bias": ({}, [True, False]),
    "embedding_multiplier": ({}, [1.5]),
    "residual_multiplier": ({}, [0.7]),
    "logit_divisor": ({}, [1.7]),
    "prediction_depth": ({}, [2]),
    "init_std": ({}, [0.03]),
}
"""Of the model section itself; `architecture` only says which of equals it becomes."""


def _changed(config: ModelConfig, section: str, changes: Changes) -> ModelConfig:
    page = config.model_dump()
    if section:
        page[section] = {**page[section], **changes}
    else:
        page |= changes
    page["intermediate_size"] = 28 if page["intermediate_size"] is None else page["intermediate_size"]
    changed = ModelConfig.model_validate(page)
    if len(changed.sparse_layers) == changed.num_blocks:
        changed = changed.model_copy(update={"intermediate_size": None})
    return changed


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}


def _written(config: ModelConfig) -> object:
    """All that an export says of a model; None: it refuses."""
    try:
        family = family_of(config)
    except ExportError:
        return None
    return config_page(family, config, SpecialTokens(), dtype="bf16", load_balancing_weight=0.0), moves(
        family, config
    )


@pytest.mark.parametrize(
    ("section", "key"),
    [
        *(("moe", key) for key in MOE),
        *(("attention", key) for key in ATTENTION),
        *(("", key) for key in WHOLE),
    ],
)
def test_a_changed_setting_is_written_or_refused(section: str, key: str) -> None:
    needed, values = {"moe": MOE, "attention": ATTENTION, "": WHOLE}[section][key]
    tried = False
    for case, (_, config) in CASES.items():
        if section and getattr(config, section) is None:
            continue
        before = _changed(config, section, needed)
        changed = [_changed(before, section, {key: value}) for value in values]
        for after, value in zip(changed, values, strict=True):
            if after == before or shape_faults(before) or shape_faults(after):
                continue  # no recipe gets so far
            tried = True
            if _written(after) is not None:
                what = f"{case}: {section}.{key}={value}"
                assert _written(after) != _written(before), f"{what} leaves no trace"
                moved = {move.ours: move.shape for move in moves(family_of(after), after)}
                with torch.device("meta"):
                    weights = _shapes(after)
                assert weights.items() <= moved.items(), f"{what} leaves weights behind"
    assert tried, f"no case can change {section}.{key}"


def test_every_setting_is_tried() -> None:
    assert set(MOE) == set(MoEConfig.model_fields)
    assert set(ATTENTION) == set(AttentionConfig.model_fields)
    assert {*WHOLE, "attention", "moe", "architecture"} == set(ModelConfig.model_fields)


@pytest.mark.parametrize("choice", ["expert", "round_robin"])
def test_a_model_whose_tokens_do_not_choose_is_refused_with_the_reason(choice: str) -> None:
    with pytest.raises(ExportError) as refused:
        check_exportable(model(moe={"router_choice": choice}))
    message = str(refused.value)
    assert f'model.moe.router_choice="{choice}"' in message
    assert "In all stock architectures each token chooses its experts." in message
    assert message.splitlines()[1].strip() == 'qwen3_moe: model.moe.router_choice="token"'
