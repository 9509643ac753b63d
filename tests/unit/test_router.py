"""Routers by what their papers say, beside stock code where someone else wrote it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import MoEConfig
from moe.sparse import choice
from moe.sparse.capacity import Capacity, accepted
from moe.sparse.router import Router, count_choices


def _router(**settings_: object) -> Router:
    config = MoEConfig.model_validate(
        {"num_experts": 8, "top_k": 2, "expert_intermediate_size": 4, **settings_}
    )
    router = Router(16, config)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


def _x(tokens: int = 64) -> torch.Tensor:
    return torch.randn(tokens, 16, generator=torch.Generator().manual_seed(1))


def _dense(ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    return torch.zeros(ids_TK.shape[0], 8).scatter_(1, ids_TK, weights_TK)


@pytest.mark.parametrize(
    "settings_",
    [
        {},
        {"top_k": 8},
        {"route_scale": 2.5},
        {"num_expert_groups": 4, "top_k_groups": 2},
        {"selection_bias": True},
        {"num_expert_groups": 2, "top_k_groups": 1, "selection_bias": True, "route_scale": 0.5},
    ],
)
def test_softmax_after_the_choice_is_softmax_before_it_normalised(settings_: dict[str, object]) -> None:
    """So `normalize_top_k` says it all: the quotient of scores is GPT-OSS's softmax over the chosen logits."""
    router, x = _router(**settings_).double(), _x().double()
    if router.selection_bias_E is not None:
        router.selection_bias_E.copy_(torch.linspace(0.3, -0.3, 8))
    routing = router(x)
    chosen = torch.softmax(x @ router.weight.t(), -1).gather(1, routing.ids_TK)
    after = torch.softmax((x @ router.weight.t()).gather(1, routing.ids_TK), -1)
    scale = router.config.route_scale
    torch.testing.assert_close(chosen / chosen.sum(-1, keepdim=True), after)
    torch.testing.assert_close(routing.weights_TK, after * scale)


def test_gpt_oss_router_is_that_of_transformers() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    stock, router = (
        GptOssTopKRouter(GptOssConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=2)),
        _router(),
    )
    stock.weight.data.copy_(router.weight)
    _, weights, ids = stock(_x())
    routing = router(_x())
    torch.testing.assert_close(_dense(routing.ids_TK, routing.weights_TK), _dense(ids, weights))


def test_normalised_weights_survive_a_choice_among_vanishing_probabilities() -> None:
    router = _router(selection_bias=True)
    assert router.selection_bias_E is not None
    router.selection_bias_E[:6] = -2.0
    router.weight.data.zero_()
    router.weight.data[0, 0] = 200.0  # so that experts 6 and 7 have probability 0 in float32
    x = torch.ones(3, 16)
    routing = router(x)
    assert routing.ids_TK.sort(-1).values.tolist() == [[6, 7]] * 3
    assert not routing.probabilities_TE[:, 6:].any()
    assert routing.weights_TK.tolist() == [[0.5, 0.5]] * 3


def test_switch_sends_a_token_to_its_best_expert_by_the_raw_probability() -> None:
    """Top 1 of arXiv:2101.03961, eq. 2: undivided, or the router would learn nothing."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersTop1Router,
    )

    config = SwitchTransformersConfig(d_model=16, num_experts=8, expert_capacity=64, router_jitter_noise=0.0)
    stock, router = SwitchTransformersTop1Router(config), _router(top_k=1, normalize_top_k=False)
    stock.classifier.weight.data.copy_(router.weight)
    one_hot, probability, _ = stock(_x().unsqueeze(0))
    routing = router(_x())
    assert torch.equal(_dense(routing.ids_TK, torch.ones(64, 1)).long(), one_hot[0])
    torch.testing.assert_close(routing.weights_TK, probability[0])
    routing.weights_TK.sum().backward()
    assert float(router.weight.grad.abs().max()) > 1e-3  # type: ignore[union-attr]  # backward made it


def test_deepseek_v3s_router_is_that_of_transformers() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=4,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    stock = DeepseekV3TopkRouter(config)
    router = _router(
        router_score="sigmoid", num_expert_groups=4, top_k_groups=2, route_scale=2.5, selection_bias=True
    )
    bias = torch.linspace(0.4, -0.8, 8)
    assert router.selection_bias_E is not None
    router.selection_bias_E.copy_(bias)
    stock.weight.data.copy_(router.weight)
    stock.e_score_correction_bias.copy_(bias)
    _, weights, ids = stock(_x())
    routing = router(_x())
    torch.testing.assert_close(_dense(routing.ids_TK, routing.weights_TK), _dense(ids, weights))


def test_the_bias_steers_the_choice_and_never_the_weights() -> None:
    plain, biased, x = _router(selection_bias=True), _router(selection_bias=True), _x()
    assert biased.selection_bias_E is not None
    biased.selection_bias_E[3] = 10.0
    routing = biased(x)
    assert bool((routing.ids_TK == 3).any(1).all())
    scores = plain(x).probabilities_TE
    expected = scores.gather(1, routing.ids_TK)
    torch.testing.assert_close(routing.weights_TK, expected / expected.sum(-1, keepdim=True))
    assert not routing.weights_TK.isnan().any()


def test_a_cast_of_the_module_leaves_the_bias_in_float32() -> None:
    router = _router(selection_bias=True)
    assert router.selection_bias_E is not None
    router.selection_bias_E.fill_(0.7012345)
    torch.nn.Sequential(router).bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.selection_bias_E.dtype == torch.float32
    router.selection_bias_E += 1e-3
    assert float(router.selection_bias_E[0]) == pytest.approx(0.7022345, abs=1e-7)
    assert "selection_bias_E" in router.state_dict()


def test_a_router_made_without_memory_can_be_given_some() -> None:
    with torch.device("meta"):
        router = _router(selection_bias=True)
    router.bfloat16().to_empty(device="cpu")
    assert router.selection_bias_E is not None
    assert (router.selection_bias_E.dtype, router.selection_bias_E.device.type) == (torch.float32, "cpu")


def test_scores_are_float32_whatever_the_model_computes_in() -> None:
    router = _router().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(_x().bfloat16())
    assert routing.weights_TK.dtype == routing.log_sum_exp_T.dtype == torch.float32
    exact = torch.softmax(_x().bfloat16().double() @ router.weight.double().t(), -1)
    torch.testing.assert_close(routing.probabilities_TE.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("score", "best"), [("max", 1), ("top2_sum", 2)])
def test_a_token_stays_within_its_best_groups(score: str, best: int) -> None:
    router, x = _router(num_expert_groups=4, top_k_groups=1, group_score=score), _x()
    routing = router(x)
    groups = routing.probabilities_TE.view(-1, 4, 2).topk(best, -1).values.sum(-1).argmax(-1)
    assert torch.equal(routing.ids_TK // 2, groups.unsqueeze(-1).expand(-1, 2))


LAYERS = st.tuples(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 999)
)


def _drawn(layer: tuple[int, int, int, float, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Scores [T, E], mask [T], top_k."""
    tokens, experts, top_k, share, seed = layer
    draw = torch.Generator().manual_seed(seed)
    scores = torch.softmax(torch.randn(tokens, experts, generator=draw) * 9, -1)
    return scores, torch.rand(tokens, generator=draw) < share, min(top_k, experts)


@settings(max_examples=80, deadline=None)
@given(LAYERS, st.booleans())
def test_each_expert_takes_its_best_tokens_and_all_take_as_many(
    layer: tuple[int, int, int, float, int], masked: bool
) -> None:
    scores, mask, top_k = _drawn(layer)
    ids, kept = choice.by_experts(scores, mask if masked else None, top_k)
    mask = mask if masked else torch.ones_like(mask)
    experts = scores.shape[1]
    taken = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, ids, kept)
    assert taken.sum() == kept.sum(), "a token's experts are all different"
    assert not taken[~mask].any()
    assert taken.sum(0).tolist() == [-(-int(mask.sum()) * top_k // experts)] * experts
    for expert in range(experts):
        here, left = scores[taken[:, expert], expert], scores[mask & ~taken[:, expert], expert]
        if here.numel() and left.numel():
            assert float(here.min()) >= float(left.max())


@settings(max_examples=80, deadline=None)
@given(LAYERS, st.booleans())
def test_in_turn_every_expert_gets_the_same_load_whatever_the_scores(
    layer: tuple[int, int, int, float, int], masked: bool
) -> None:
    scores, mask, top_k = _drawn(layer)
    ids = choice.in_turn(scores, mask if masked else None, top_k)
    assert torch.equal(ids, choice.in_turn(scores.flip(0).roll(1, 1), mask if masked else None, top_k))
    counts = count_choices(ids, mask if masked else None, scores.shape[1])
    assert int(counts.max() - counts.min()) <= 1
    assert all(len(set(row)) == top_k for row in ids.tolist())


def test_in_turn_a_token_visits_many_ranks() -> None:
    """64 experts on 8 ranks, 8 choices: neighbours would all live on one rank, and sending would look too cheap."""
    ranks = choice.in_turn(torch.zeros(512, 64), None, 8) // 8
    assert min(len(set(row)) for row in ranks.tolist()) >= 7


@pytest.mark.parametrize("chosen", ["expert", "round_robin"])
def test_weights_come_from_the_scores_whoever_chooses(chosen: str) -> None:
    router, x = _router(router_choice=chosen, normalize_top_k=False, route_scale=2.0), _x()
    routing = router(x)
    expected = 2.0 * torch.softmax(x @ router.weight.t(), -1).gather(1, routing.ids_TK)
    if routing.kept_TK is not None:
        assert routing.kept_TK.sum(1).unique().numel() > 1, "tokens differ in their number of experts"
        expected = expected * routing.kept_TK
    torch.testing.assert_close(routing.weights_TK, expected)
    assert routing.counts_E.tolist() == [16] * 8
    routing.weights_TK.square().sum().backward()
    assert bool((router.weight.grad.abs().amax(1) > 1e-4).all())  # type: ignore[union-attr]  # backward made it


def test_experts_choose_with_an_eye_on_the_future_and_tokens_do_not() -> None:
    """What the caution at the start of training says."""
    x = _x(12)
    later = x.clone()
    later[6:] *= 3.0
    for chosen, looks_ahead in (("expert", True), ("token", False), ("round_robin", False)):
        router = _router(router_choice=chosen, normalize_top_k=False)
        before, after = (
            _dense(routing.ids_TK, routing.weights_TK)[:6] for routing in (router(x), router(later))
        )
        assert torch.equal(before, after) != looks_ahead


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 6),
    st.floats(0.05, 3.0),
    st.sampled_from(["score", "position"]),
    st.integers(0, 999),
)
def test_no_expert_accepts_more_than_its_capacity_nor_drops_while_it_has_room(
    tokens: int, experts: int, top_k: int, factor: float, drop_by: str, seed: int
) -> None:
    top_k = min(top_k, experts)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=draw)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=draw)
    kept = (torch.rand(tokens, generator=draw) < 0.8).unsqueeze(-1).expand(-1, top_k)
    capacity = Capacity(factor, drop_by)  # type: ignore[arg-type]  # one of the two
    sent = accepted(ids, weights, kept, capacity, experts)
    assert not (sent & ~kept).any()
    limit = capacity.rows(int(kept[:, 0].sum()), top_k, experts)
    for expert in range(experts):
        wanted, got = kept & (ids == expert), sent & (ids == expert)
        assert int(got.sum()) == min(limit, int(wanted.sum()))
        lost = wanted & ~got
        if got.any() and lost.any():
            if drop_by == "score":
                assert float(weights[got].min()) >= float(weights[lost].max())
            else:
                assert int(got.nonzero()[:, 0].max()) < int(lost.nonzero()[:, 0].min())
