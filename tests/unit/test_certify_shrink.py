"""A recipe of any size becomes a small one with the same switches, which fits any number of ranks as it did."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.certify.layouts import Layout, choose, offloads, parse, reference, spread, zero_stages
from moe.certify.shrink import STEPS, shrink
from moe.config import AttentionConfig, ModelConfig, MoEConfig, RunConfig, check_world
from moe.config.numbers import divisors
from moe.errors import ConfigError
from moe.recipe import load

SHRUNK: dict[type, set[str]] = {
    ModelConfig: {
        *("vocab_size", "hidden_size", "num_layers", "intermediate_size", "max_sequence_length", "init_std"),
        *("attention", "moe", "prediction_depth"),
    },
    AttentionConfig: {
        *(
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "latent",
            "sliding_window",
            "window_layers",
            "rope_fraction",
        ),
    },
    MoEConfig: {
        *("num_experts", "top_k", "expert_intermediate_size", "activation_limit", "latent_size"),
        *("num_expert_groups", "top_k_groups", "first_k_dense", "shared_expert_intermediate_size"),
        "dense_layers",
    },
}
KEPT: dict[type, set[str]] = {
    ModelConfig: {
        *("norm", "norm_placement", "norm_eps", "tie_embeddings", "head_bias", "architecture"),
        *("embedding_multiplier", "residual_multiplier", "logit_divisor"),
    },
    AttentionConfig: {
        *("qk_norm", "qkv_bias", "output_bias", "clip_qkv", "sinks", "output_gate", "scale"),
        *("rope_theta", "rope_scaling", "rope_layers"),
    },
    MoEConfig: {
        *("expert_activation", "expert_bias", "router_score", "router_choice", "normalize_top_k"),
        *("route_scale", "group_score", "selection_bias", "shared_expert_gate", "router_bias"),
        *("sparsemixer_margin", "activation_alpha"),
    },
}


def test_every_setting_of_a_model_is_shrunk_or_kept() -> None:
    for section in SHRUNK:
        assert SHRUNK[section] | KEPT[section] == set(section.model_fields), section  # type: ignore[attr-defined]


def _or_none(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


@st.composite
def recipes(draw: st.DrawFn) -> RunConfig:
    """Sound recipes of all sizes."""
    heads = draw(st.sampled_from([1, 2, 3, 5, 8, 64]))
    width = draw(st.sampled_from([8, 120, 512, 4096]))
    attention = {
        "num_heads": heads,
        "num_kv_heads": draw(_or_none(st.sampled_from(divisors(heads)))),
        "head_dim": draw(st.sampled_from([8, 64, 128] + [None] * (width % (2 * heads) == 0))),
        "qk_norm": draw(st.booleans()),
        "qkv_bias": draw(st.booleans()),
    }
    sparse, first = draw(st.booleans()), draw(st.integers(0, 3))
    moe, balance = draw(_sparse(first)) if sparse else (None, {})
    experts = moe["num_experts"] if moe else 1
    kind, steps = draw(st.sampled_from(["cosine", "wsd", "constant"])), draw(st.sampled_from([2, 10_000]))
    optimizer = draw(st.sampled_from(["adamw", "muon"]))
    return RunConfig.model_validate(
        {
            "name": "any",
            "model": {
                "vocab_size": draw(st.sampled_from([2, 500, 150_000])),
                "hidden_size": width,
                "num_layers": first + draw(st.integers(1, 60)),
                "intermediate_size": 300 if not sparse or first else None,
                "max_sequence_length": 4096,
                "tie_embeddings": draw(st.booleans()),
                "attention": attention,
                "moe": moe,
            },
            "data": {"path": "unused", "sequence_length": draw(st.sampled_from([1, 7, 4096]))},
            "train": {
                "steps": steps,
                "global_batch_size": draw(st.sampled_from([1, 512])),
                "micro_batch_size": 1,
                "precision": draw(st.sampled_from(["fp32", "bf16"])),
                "activation_recomputation": draw(st.sampled_from(["none", "block"])),
                "evaluate_every": draw(_or_none(st.just(10))),
                "optimizer": {
                    "kind": optimizer,
                    "learning_rate": 1e-3,
                    "gradient_clipping": draw(st.sampled_from([0.0, 1.0])),
                },
                "schedule": {
                    "kind": kind,
                    "warmup_steps": draw(st.integers(0, steps // 2)),
                    "decay_steps": draw(st.integers(1, steps // 2)) if kind == "wsd" else None,
                },
                "guard": {"non_finite": draw(st.sampled_from(["stop", "skip"]))},
            },
            "parallel": {
                "expert_parallel_size": draw(st.sampled_from(divisors(experts))),
                "zero_stage": draw(st.sampled_from([1, 2] if optimizer == "muon" else [1, 2, 3])),
            },
            "balance": balance,
            "deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}} if draw(st.booleans()) else {},
        }
    )


@st.composite
def _sparse(draw: st.DrawFn, first_k_dense: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sections moe and balance."""
    choice = draw(st.sampled_from(["token", "token", "token", "expert", "round_robin"]))
    free = choice == "token"
    experts = draw(st.sampled_from([1, 2, 6, 8, 60, 64, 128, 256, 257]))
    groups = draw(_or_none(st.sampled_from(divisors(experts)))) if free else None
    chosen = groups and draw(st.integers(1, groups))
    size = experts // (groups or 1)
    top_k = draw(st.integers(1, min(9, size * (chosen or 1))))
    bias = free and draw(st.booleans())
    shared = draw(_or_none(st.sampled_from([1, 2048])))
    moe = {
        "num_experts": experts,
        "top_k": top_k,
        "expert_intermediate_size": draw(st.sampled_from([1, 16, 768])),
        "expert_activation": draw(st.sampled_from(["swiglu", "gpt_oss"])),
        "activation_limit": draw(_or_none(st.sampled_from([0.1, 7.0]))),
        "expert_bias": draw(st.booleans()),
        "latent_size": draw(_or_none(st.sampled_from([1, 7]))),
        "router_score": draw(st.sampled_from(["softmax", "sigmoid"])),
        "router_choice": choice,
        "normalize_top_k": top_k > 1 and choice != "expert" and draw(st.booleans()),
        "num_expert_groups": groups,
        "top_k_groups": chosen,
        "group_score": draw(st.sampled_from(["max", "top2_sum"] if size > 1 else ["max"]))
        if groups
        else "top2_sum",
        "selection_bias": bias,
        "first_k_dense": first_k_dense,
        "shared_expert_intermediate_size": shared,
        "shared_expert_gate": shared is not None and draw(st.booleans()),
    }
    balance = {
        "sequence_loss_weight": draw(st.sampled_from([0.0, 0.01])) if free else 0.0,
        "global_batch_loss_weight": draw(st.sampled_from([0.0, 0.01])) if free else 0.0,
        "bias_update_rate": 0.01 if bias else 0.0,
        "router_jitter": draw(st.sampled_from([0.0, 0.1])),
        "capacity_factor": draw(
            _or_none(st.sampled_from([0.3, 0.6, 0.99]).map(lambda share: share * experts / top_k))
        )
        if free
        else None,
    }
    return moe, balance


@settings(max_examples=60, deadline=None)
@given(recipes(), st.sampled_from([1, 2, 3, 4, 6, 8]))
def test_a_small_recipe_has_every_switch_and_fits_every_layout(run: RunConfig, world: int) -> None:
    small = shrink(run, world)
    assert _switches(small) == _switches(run)
    assert small.train.steps == STEPS
    sizes = [small.model.hidden_size, small.model.vocab_size, small.data.sequence_length]
    assert max(sizes) <= 128
    assert small.model.num_layers <= 3
    experts = run.model.moe.num_experts if run.model.moe else 1
    for ep in divisors(world):
        if experts % ep == 0:
            for accumulation in (1, 2):
                layout = Layout(world, ep, accumulation=accumulation)
                assert check_world(spread(small, layout), world) == accumulation
                check_world(spread(small, reference(small, layout)), 1)


def _switches(run: RunConfig) -> object:
    """What a size does not change, and whether each size is there at all."""
    model, moe, attention = run.model, run.model.moe, run.model.attention
    heads = attention.num_heads
    found: list[Any] = [
        {key: getattr(model, key) for key in KEPT[ModelConfig]},
        {key: getattr(attention, key) for key in KEPT[AttentionConfig]},
        ({1: "one", heads: "all"}.get(attention.num_kv_heads or heads, "some"), attention.head_dim is None),
        run.balance.model_copy(update={"capacity_factor": run.balance.capacity_factor is not None}),
        run.deepspeed,
        run.seed,
        run.train.guard.non_finite,
        (run.train.precision, run.train.optimizer.kind, run.train.optimizer.gradient_clipping > 0),
        (run.train.schedule.kind, run.train.schedule.warmup_steps > 0),
    ]
    if heads == 1:  # one is all
        found[2] = attention.head_dim is None
    if moe is not None:
        groups = moe.num_expert_groups and {1: "one", moe.num_expert_groups: "all"}.get(
            moe.top_k_groups or 0, "some"
        )
        if moe.num_expert_groups == 1:
            groups = "all"
        found += [
            {key: getattr(moe, key) for key in KEPT[MoEConfig]},
            (moe.first_k_dense > 0, min(moe.top_k, 3), groups),
            [moe.latent_size is None, moe.activation_limit is None],
            moe.shared_expert_intermediate_size is None,
        ]
    return found


def _demo() -> tuple[RunConfig, RunConfig]:
    run = load(RunConfig, "configs/demo.yaml")
    return run, shrink(run, 4)


def test_the_selection_has_every_ep_with_every_stage_and_each_value_of_the_other_axes() -> None:
    run, small = _demo()
    chosen = choose(small, run, 4).layouts
    assert {(layout.ep, layout.zero) for layout in chosen if layout.world == 4} >= {
        (ep, zero) for ep in (1, 2, 4) for zero in zero_stages()
    }
    assert {layout.recompute for layout in chosen} == {"none", "experts", "block"}
    assert {layout.accumulation for layout in chosen} == {1, 2}
    assert {layout.then for layout in chosen} == {"", "resume", "resize"}
    assert {layout.sp for layout in chosen} == {1, 2}
    assert {layout.offload for layout in chosen} == set(offloads())


def test_what_the_rules_refuse_is_left_out_with_the_rule() -> None:
    run, _ = _demo()
    run = run.model_copy(update={"train": run.train.model_copy(update={"precision": "bf16"})})
    small = shrink(run, 2)
    choice = choose(small, run, 2, ["zero=0/1"])
    assert [layout.zero for layout in choice.layouts] == [1]
    assert "parallel.zero_stage is 0 with train.precision bf16" in choice.left_out[0][1]
    with pytest.raises(ConfigError, match="the recipe allows none of them"):
        choose(small, run, 2, ["zero=0"])


def test_layouts_are_all_combinations_of_what_is_asked() -> None:
    found = parse("ep=1/2, zero=1,then=resume", 2)
    assert found == [Layout(2, 1, then="resume"), Layout(2, 2, then="resume")]
    assert parse("world=1,accumulation=2", 4) == [Layout(1, accumulation=2)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is no part of a layout"),
        ("ep", "'ep' is no part"),
        ("ep=", "no part of a layout"),
        ("epp=2", "axes are world, ep, sp, zero"),
        ("ep=two", "ep is 'two': it must be a number of 1 to 64"),
        ("ep=0", "must be a number of 1 to 64"),
        ("zero=9", "zero is '9': it must be one of 0, 1, 2"),
        ("recompute=all", "must be one of none, experts, block"),
        ("then=stop", "must be one of resume, resize"),
    ],
)
def test_words_that_are_no_layout_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(text, 2)
