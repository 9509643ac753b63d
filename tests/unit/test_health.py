"""The health of sparse layers against plain loops over float64, over any split, without reading a tensor."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import MoEConfig
from moe.sparse import RoutingRecord, health
from moe.sparse.router import Router


def _entropy(weights: list[float]) -> float:
    """Of a distribution given by weights, over that of an even one."""
    shares = [weight / sum(weights) for weight in weights]
    return -sum(share * math.log(share) for share in shares if share) / math.log(len(weights))


def loops(logits: list[list[float]], score: str) -> dict[str, float]:
    """What `health.summarize` says of one layer, from the logits of its unmasked tokens, token by token."""
    num_experts = len(logits[0])
    mean, entropy, squares, largest, log_sum_exp = [0.0] * num_experts, 0.0, 0.0, 0.0, -math.inf
    for row in logits:
        top = max(row)
        raw = [math.exp(x - top) if score == "softmax" else 1 / (1 + math.exp(-x)) for x in row]
        probabilities = [x / sum(raw) for x in raw]
        mean = [a + b for a, b in zip(mean, probabilities, strict=True)]
        entropy += _entropy(probabilities)
        squares += sum(x * x for x in row)
        largest = max(largest, *(abs(x) for x in row))
        log_sum_exp = max(log_sum_exp, top + math.log(sum(math.exp(x - top) for x in row)))
    return {
        "token_entropy": entropy / len(logits),
        "router_entropy": _entropy(mean),
        "logit_rms": math.sqrt(squares / (len(logits) * num_experts)),
        "logit_max": largest,
        "log_sum_exp_max": log_sum_exp,
    }


def _routed(
    tokens: int, score: str = "softmax", seed: int = 0, scale: float = 1.0, **router: Any
) -> tuple[RoutingRecord, torch.Tensor]:
    """A record of a real router in float64, and the mask it was made with."""
    draw = torch.Generator().manual_seed(seed)
    config = MoEConfig(num_experts=6, top_k=2, expert_intermediate_size=8, router_score=score, **router)
    layer = Router(10, config).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(6, 10, generator=draw, dtype=torch.float64) * scale)
    mask = torch.rand(tokens, generator=draw) < 0.7
    mask[0] = True
    x = torch.randn(tokens, 10, generator=draw, dtype=torch.float64)
    return layer(x, mask).record(torch.zeros((), dtype=torch.int64)), mask


def _values(found: health.Health, layer: int) -> dict[str, float]:
    return {name: float(value[layer]) for name, value in vars(found).items() if value is not None}


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 40.0])
def test_health_is_what_loops_find(score: str, scale: float) -> None:
    """At 40 most probabilities are 0 in float64, and their entropy is still no NaN."""
    record, mask = _routed(50, score, scale=scale)
    found = health.summarize(health.observe([record], mask), mask.sum())
    assert _values(found, 0) == pytest.approx(loops(record.logits_TE[mask].tolist(), score), rel=1e-9)
    assert found.bias_min is None
    assert found.bias_max is None


def test_masked_tokens_count_nowhere_even_if_they_are_not_finite() -> None:
    record, mask = _routed(30)
    clean = health.summarize(health.observe([record], mask), mask.sum())
    for value in (float("nan"), float("inf"), 1e30):
        bad = {
            name: getattr(record, name).detach().clone()
            for name in ("probabilities_TE", "log_sum_exp_T", "logits_TE")
        }
        for tensor in bad.values():
            tensor[~mask] = value
        found = health.summarize(health.observe([record._replace(**bad)], mask), mask.sum())
        assert _values(found, 0) == _values(clean, 0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 999))
def test_samples_of_any_split_join_to_the_whole(sizes: list[int], seed: int) -> None:
    whole, mask = _routed(sum(sizes), seed=seed)
    layers = (whole, whole._replace(logits_TE=whole.logits_TE * 2))
    sample = None
    for rows in torch.arange(sum(sizes)).split(sizes):
        parts = [
            record._replace(
                probabilities_TE=record.probabilities_TE[rows],
                log_sum_exp_T=record.log_sum_exp_T[rows],
                logits_TE=record.logits_TE[rows],
            )
            for record in layers
        ]
        sample = health.observe(parts, mask[rows]).joined(sample)
    assert sample is not None
    joined = health.summarize(sample, mask.sum())
    once = health.summarize(health.observe(layers, mask), mask.sum())
    for layer in (0, 1):
        assert _values(joined, layer) == pytest.approx(_values(once, layer), rel=1e-12)
    assert float(once.logit_rms[1]) == pytest.approx(2 * float(once.logit_rms[0]))


def test_the_bias_range_is_that_of_each_layer() -> None:
    record, mask = _routed(5)
    biases = [torch.tensor([0.5, -1.0, 0.0, 0.0, 0.0, 0.1]), torch.arange(6.0)]
    found = health.summarize(health.observe([record, record], mask), mask.sum(), biases)
    assert found.bias_min is not None
    assert found.bias_max is not None
    assert (found.bias_min.tolist(), found.bias_max.tolist()) == ([-1.0, 0.0], [0.5, 5.0])
    biases[0][0] = 9.0  # a later step of the bias does not reach back
    assert found.bias_max.tolist() == [0.5, 5.0]


def test_entropy_is_one_when_even_zero_when_collapsed_and_never_nan() -> None:
    weights = torch.tensor([[3, 3, 3, 3], [12, 0, 0, 0], [0, 0, 0, 0], [6, 6, 0, 0], [2**60, 1, 1, 1]])
    assert health.normalized_entropy(weights).tolist() == pytest.approx([1.0, 0.0, 0.0, 0.5, 0.0], abs=1e-15)
    assert health.normalized_entropy(torch.tensor([[5], [0]])).tolist() == [1.0, 1.0]


def test_nothing_joins_the_graph() -> None:
    record, mask = _routed(8)
    assert record.probabilities_TE.requires_grad
    assert not record.logits_TE.requires_grad
    sample = health.observe([record], mask)
    assert not sample.sums_LM.requires_grad
    assert not sample.maxima_L2.requires_grad


def test_nothing_is_read_on_the_host() -> None:
    """Tensors on the meta device have no values: whoever asked for one would fail."""
    record, mask = _routed(8)
    on_meta = {name: value.to("meta") for name, value in record._asdict().items()}
    counts = torch.zeros(1, 6, dtype=torch.int64, device="meta")
    sample = health.observe([RoutingRecord(**on_meta)], mask.to("meta")).joined(None)
    health.summarize(sample.joined(sample), mask.sum().to("meta"), [torch.zeros(6, device="meta")])
    health.dead_experts(health.steps_since_use(health.steps_since_use(None, counts), counts))
    health.normalized_entropy(counts)


def test_an_expert_dies_after_the_window_and_one_token_revives_it() -> None:
    starved, fed = torch.tensor([[4, 0, 9], [1, 1, 1]]), torch.tensor([[4, 1, 8], [1, 1, 1]])
    unused, dead = None, []
    for step in range(9):
        unused = health.steps_since_use(unused, fed if step == 6 else starved)
        dead.append(health.dead_experts(unused, after=4).tolist())
        assert unused.dtype == torch.int64
    assert dead == [[0, 0]] * 3 + [[1, 0]] * 3 + [[0, 0]] * 3
    assert unused is not None
    assert unused.tolist() == [[0, 2, 0], [0, 0, 0]]


def test_the_window_is_a_hundred_steps_by_default() -> None:
    ages = torch.tensor([[0, 1, 99, 100, 101]])
    assert health.dead_experts(ages).tolist() == [2]
