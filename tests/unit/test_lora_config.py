"""The lora section of a recipe: each setting acts or is refused, and what it trains is counted before it starts."""

import copy
from typing import Any

import pytest

from moe.config import RunConfig
from moe.config.base import build
from moe.errors import ConfigError
from moe.model.lora import sentence, trained
from moe.recipe import dump, parse

LORA = {"rank": 4, "alpha": 8.0, "targets": ["attention", "experts"]}


def _with(page: dict[str, Any], **lora: Any) -> dict[str, Any]:
    return {**copy.deepcopy(page), "lora": {**LORA, **lora}}


def test_a_resolved_recipe_reads_back_with_its_lora(tiny_page: dict[str, Any]) -> None:
    run = build(RunConfig, _with(tiny_page), "here")
    assert parse(RunConfig, dump(run), source="there") == run
    assert run.lora is not None
    assert run.lora.scale == 2.0
    assert build(RunConfig, tiny_page, "here").lora is None


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"targets": ["attention", "dense"]}, ["lora.targets has dense", "there are attention, experts"]),
        ({"targets": ["shared_expert"]}, ["lora.targets has shared_expert"]),
        ({"targets": []}, ["lora.targets"]),
        ({"targets": ["experts", "experts"]}, ["lora.targets", "each target once"]),
        ({"targets": ["router"]}, ["lora.targets", "router"]),
        ({"rank": 0}, ["lora.rank"]),
        ({"alpha": 0.0}, ["lora.alpha"]),
        ({"dropout": 0.1}, ["lora.dropout", "no such setting"]),
    ],
)
def test_what_would_have_no_effect_is_refused(
    lora: dict[str, Any], words: list[str], tiny_page: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        build(RunConfig, _with(tiny_page, **lora), "here")
    assert not [word for word in words if word not in str(refusal.value)], refusal.value


def test_experts_of_a_dense_model_are_refused(tiny_page: dict[str, Any]) -> None:
    del tiny_page["model"]["moe"]
    tiny_page["model"]["intermediate_size"] = 16
    with pytest.raises(ConfigError, match=r"lora\.targets has experts.*there are attention, dense"):
        build(RunConfig, _with(tiny_page), "here")


def test_frozen_selection_biases_stay_and_do_not_move(tiny_page: dict[str, Any]) -> None:
    tiny_page["model"]["moe"]["selection_bias"] = True
    assert build(RunConfig, _with(tiny_page), "here").model.moe.selection_bias  # type: ignore[union-attr]
    tiny_page["balance"] = {"bias_update_rate": 0.01}
    with pytest.raises(ConfigError, match=r"bias_update_rate is 0\.01 with lora"):
        build(RunConfig, _with(tiny_page), "here")


def test_trained_parameters_are_counted_by_target_and_said(tiny_page: dict[str, Any]) -> None:
    run = build(RunConfig, _with(tiny_page), "here")
    assert run.lora is not None
    counts = trained(run.model, run.lora)
    attention = 4 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32))
    experts = 8 * 4 * ((32 + 32) + (16 + 32))
    assert counts == {"attention": 2 * attention, "experts": 2 * experts}
    said = sentence(counts, 100_000)
    assert said.startswith(f"adapters have {2 * (attention + experts):,} trained parameters, ")
    assert said.endswith(f"attention {2 * attention:,}, experts {2 * experts:,}")
