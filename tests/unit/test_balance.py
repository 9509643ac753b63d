"""Balancing losses by their laws: 1 when balanced, E when collapsed, each layer on its own, additive over splits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import BalanceConfig
from moe.loss import Totals, choices, losses
from moe.model import ModelOutput
from moe.sparse import RoutingRecord, balance
from moe.sparse.router import count_choices


def _record(logits_TE: torch.Tensor, top_k: int, mask_T: torch.Tensor | None = None) -> RoutingRecord:
    scores = torch.softmax(logits_TE, -1)
    ids = torch.topk(scores, top_k).indices
    counts = count_choices(ids, mask_T, logits_TE.shape[1])
    dropped = torch.zeros((), dtype=torch.int64)
    return RoutingRecord(ids, scores, torch.logsumexp(logits_TE, -1), counts, dropped, logits_TE.detach())


def test_balance_is_one_and_collapse_is_the_number_of_experts() -> None:
    balanced = _record(torch.eye(4).repeat(3, 1) * 100, 1)
    collapsed = _record(torch.tensor([[100.0, 0, 0, 0]]).repeat(12, 1), 1)
    mask = torch.ones(1, 12, dtype=torch.bool)
    assert float(balance.sequence_balance(balanced, mask)) == pytest.approx(1.0)
    assert float(balance.sequence_balance(collapsed, mask)) == pytest.approx(4.0)


def test_layers_collapsed_on_different_experts_are_not_taken_for_balance() -> None:
    """Pooled over layers, as transformers does it, this would look perfect and have no gradient."""
    records = tuple(_record(torch.eye(4)[i].mul(9.0).repeat(12, 1).requires_grad_(), 1) for i in range(4))
    mask = torch.ones(1, 12, dtype=torch.bool)
    one = torch.tensor(1.0)
    for scope in ("sequence", "micro_batch", "global_batch"):
        weights = {"sequence_loss_weight": 0.0, f"{scope}_loss_weight": 1.0}
        config = BalanceConfig(**weights, router_z_loss_weight=0.0)
        totals = Totals(one * 12, one, 1, torch.stack([r.counts_E for r in records]))
        found = losses(ModelOutput(torch.zeros(()), records), mask, totals, config)
        assert float(found.load_balancing) > 3.9


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(2, 8),
    st.integers(1, 3),
    st.integers(0, 999),
    st.booleans(),
)
def test_shares_of_any_split_add_up_to_the_whole(
    sequences: int, length: int, experts: int, top_k: int, seed: int, global_scope: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(sequences, length, experts, generator=draw, dtype=torch.float64)
    mask = torch.rand(sequences, length, generator=draw) < 0.8
    mask[0, 0] = True
    top_k = min(top_k, experts)
    wide, narrow = (0.3, 0.0) if global_scope else (0.0, 0.3)
    config = BalanceConfig(
        sequence_loss_weight=narrow, global_batch_loss_weight=wide, router_z_loss_weight=0.2
    )
    counts = _record(logits.flatten(0, 1), top_k, mask.flatten()).counts_E.unsqueeze(0)
    totals = Totals(mask.sum().double(), mask.any(1).sum().double(), 1, counts)

    def share(rows: slice) -> torch.Tensor:
        here = mask[rows]
        record = _record(logits[rows].flatten(0, 1), top_k, here.flatten())
        zero = torch.zeros((), dtype=torch.float64)
        return losses(ModelOutput(zero, (record,)), here, totals, config).total

    whole = share(slice(None))
    parts = sum((share(slice(i, i + 1)) for i in range(sequences)), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(whole, parts)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(2, 8),
    st.integers(1, 3),
    st.integers(0, 999),
    st.sampled_from(["sequence_loss_weight", "micro_batch_loss_weight"]),
)
def test_shares_of_parts_of_sequences_add_up_to_whole_ones(
    sequences: int, parts: int, length: int, experts: int, top_k: int, seed: int, scope: str
) -> None:
    """Given the choices of the whole; gradients too. Masks cut anywhere, so a part or a sequence may be empty."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randn(sequences, parts * length, experts, generator=draw, dtype=torch.float64)
    mask = torch.rand(sequences, parts * length, generator=draw) < 0.6
    weights = {"sequence_loss_weight": 0.0, "router_z_loss_weight": 0.2, scope: 0.3}
    totals = Totals(mask.sum().double().clamp(min=1), mask.any(1).sum().double().clamp(min=1), 1)

    def outcome(positions: list[slice]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = drawn.clone().requires_grad_()
        outputs = []
        for here in positions:
            flat = logits[:, here].flatten(0, 1)
            record = _record(flat, min(top_k, experts), mask[:, here].flatten())
            outputs.append(ModelOutput(torch.zeros((), dtype=torch.float64), (record,)))
        pairs = list(zip(outputs, positions, strict=True))
        known = torch.stack([choices(output, mask[:, here]) for output, here in pairs]).sum(0)
        given_choices = known if len(positions) > 1 else None
        shares = [
            losses(o, mask[:, at], totals, BalanceConfig(**weights), given_choices).total for o, at in pairs
        ]
        total = torch.stack(shares).sum()
        total.backward()
        assert logits.grad is not None
        return total.detach(), logits.grad

    whole = outcome([slice(None)])
    in_parts = outcome([slice(i * length, (i + 1) * length) for i in range(parts)])
    torch.testing.assert_close(in_parts, whole)


def test_z_loss_is_the_square_of_log_sum_exp() -> None:
    record = _record(torch.zeros(3, 8), 2)
    mask = torch.tensor([True, True, False])
    assert float(balance.z_loss(record, mask)) == pytest.approx(2 * torch.log(torch.tensor(8.0)).item() ** 2)


def test_max_violation_is_zero_in_balance_and_never_nan() -> None:
    counts = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [0, 0, 0, 0]])
    assert balance.max_violation(counts).tolist() == pytest.approx([0.0, 3.0, -1.0])


def test_a_bias_moves_against_the_load_and_rests_in_balance() -> None:
    counts = torch.tensor([[4, 0, 8, 4], [4, 4, 4, 4], [0, 0, 0, 0]])
    sign = balance.bias_step(counts, 0.1, "sign")
    assert sign.flatten().tolist() == pytest.approx([0.0, 0.1, -0.1, 0.0, *[0.0] * 8])
    proportional = balance.bias_step(counts, 0.1, "proportional")
    assert proportional[0].tolist() == pytest.approx([0.0, 0.1, -0.1, 0.0])
    lopsided = balance.bias_step(torch.tensor([[16, 0, 0, 0]]), 0.1, "proportional")
    assert lopsided[0].tolist() == pytest.approx([-0.3, 0.1, 0.1, 0.1])
    assert sign.dtype == torch.float32


def test_counts_beyond_floats_are_still_exact() -> None:
    """2^24 + 1 is no float32: a bias moved by rounded counts would rest or turn."""
    counts = torch.tensor([[2**24 + 1, 2**24, 2**24, 2**24 - 1]])
    assert balance.bias_step(counts, 1.0, "sign").tolist() == [[-1.0, 0.0, 0.0, 1.0]]


def test_the_micro_batch_loss_is_that_of_its_own_tokens() -> None:
    collapsed = _record(torch.tensor([[100.0, 0, 0, 0]]).repeat(12, 1), 1)
    assert float(balance.micro_batch_balance(collapsed, torch.ones(12, dtype=torch.bool))) == pytest.approx(
        4.0
    )
    assert float(balance.micro_batch_balance(collapsed, torch.zeros(12, dtype=torch.bool))) == 0.0
