"""No switch of a model is lost on export: every setting, changed, is written down differently or refused.

A row of the table that forgets a switch would take the model for another one, with healthy-looking files.
"""

from typing import Any

import pytest
import torch

from moe.config import AttentionConfig, ModelConfig, MoEConfig
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
    "activation_limit": ({}, [7.0]),
    "expert_bias": ({}, [True]),
    "latent_size": ({}, [12]),
    "router_score": ({}, ["sigmoid"]),
    "router_choice": ({}, ["expert", "round_robin"]),
    "normalize_top_k": ({}, [True, False]),
    "route_scale": ({}, [2.5]),
    "num_expert_groups": ({"top_k_groups": 1}, [1]),
    "top_k_groups": ({"num_expert_groups": 5}, [3]),
    "group_score": ({"num_expert_groups": 2, "top_k_groups": 1}, ["max"]),
    "selection_bias": ({}, [True]),
    "first_k_dense": ({}, [0, 1]),
    "shared_expert_intermediate_size": ({}, [None, 52]),
    "shared_expert_gate": ({"shared_expert_intermediate_size": 36}, [True, False]),
}
ATTENTION: dict[str, tuple[Changes, list[Any]]] = {
    "num_heads": ({}, [2, 12]),
    "num_kv_heads": ({}, [1]),
    "head_dim": ({}, [10]),
    "qk_norm": ({}, [True, False]),
    "qkv_bias": ({}, [True, False]),
    "rope_theta": ({}, [4321.0]),
}


def _changed(config: ModelConfig, section: str, changes: Changes) -> ModelConfig:
    page = config.model_dump()
    page[section] = {**page[section], **changes}
    page["intermediate_size"] = page["intermediate_size"] or 28  # for layers that become dense
    return ModelConfig.model_validate(page)


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
    ("section", "key"), [*(("moe", key) for key in MOE), *(("attention", key) for key in ATTENTION)]
)
def test_a_changed_setting_is_written_or_refused(section: str, key: str) -> None:
    needed, values = (MOE if section == "moe" else ATTENTION)[key]
    for case, (_, config) in CASES.items():
        if getattr(config, section) is None:
            continue
        before = _changed(config, section, needed)
        changed = [_changed(before, section, {key: value}) for value in values]
        assert any(after != before for after in changed), case
        for after, value in zip(changed, values, strict=True):
            if after != before and _written(after) is not None:
                what = f"{case}: {section}.{key}={value}"
                assert _written(after) != _written(before), f"{what} leaves no trace"
                moved = {move.ours: move.shape for move in moves(family_of(after), after)}
                with torch.device("meta"):
                    weights = {name: tuple(p.shape) for name, p in Transformer(after).named_parameters()}
                assert weights.items() <= moved.items(), f"{what} leaves weights behind"


def test_every_setting_is_tried() -> None:
    assert set(MOE) == set(MoEConfig.model_fields)
    assert set(ATTENTION) == set(AttentionConfig.model_fields)


@pytest.mark.parametrize("choice", ["expert", "round_robin"])
def test_a_model_whose_tokens_do_not_choose_is_refused_with_the_reason(choice: str) -> None:
    with pytest.raises(ExportError) as refused:
        check_exportable(model(moe={"router_choice": choice}))
    message = str(refused.value)
    assert f'model.moe.router_choice="{choice}"' in message
    assert "In all stock architectures each token chooses its experts." in message
    assert message.splitlines()[1].strip() == 'qwen3_moe: model.moe.router_choice="token"'
