"""Attention with windows and sinks against a masked softmax, float64, forward and gradients."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.model.attend import attend


def plain(
    q_BShd: Tensor, k_BSgd: Tensor, v_BSgv: Tensor, scale: float, window: int | None, sinks_h: Tensor | None
) -> Tensor:
    """All logits, a mask, a softmax in which sinks take part, and a sum."""
    times = q_BShd.shape[2] // k_BSgd.shape[2]
    k_BShd, v_BShv = (x.repeat_interleave(times, dim=2) for x in (k_BSgd, v_BSgv))
    logits_BhSX = torch.einsum("bshd,bxhd->bhsx", q_BShd, k_BShd) * scale
    length = q_BShd.shape[1]
    ago_SX = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen_SX = (ago_SX >= 0) & (ago_SX < (length if window is None else window))
    logits_BhSX = logits_BhSX.masked_fill(~seen_SX, float("-inf"))
    if sinks_h is not None:
        sinks = sinks_h.view(1, -1, 1, 1).expand(logits_BhSX.shape[0], -1, length, 1)
        logits_BhSX = torch.cat((logits_BhSX, sinks), dim=-1)
    shares_BhSX = logits_BhSX.softmax(-1)[..., :length]
    return torch.einsum("bhsx,bxhv->bshv", shares_BhSX, v_BShv)


def inputs(
    batch: int, length: int, heads: int, groups: int, width: int, value: int, *, sinks: bool
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, heads, width), (batch, length, groups, width), (batch, length, groups, value)]
    shapes += [(heads,)] if sinks else []  # type: ignore[list-item]  # of another rank
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).requires_grad_()
        for shape in shapes
    ]


# Below, equal to, above, and not a multiple of the window; the window of one position; no window at all.
@example(length=5, window=7, groups=2, times=2, batch=2, widths=(4, 4), sinks=True)
@example(length=7, window=7, groups=2, times=2, batch=2, widths=(4, 4), sinks=True)
@example(length=8, window=7, groups=2, times=2, batch=2, widths=(4, 4), sinks=True)
@example(length=21, window=7, groups=1, times=3, batch=2, widths=(4, 6), sinks=False)
@example(length=24, window=7, groups=1, times=3, batch=2, widths=(4, 6), sinks=True)
@example(length=6, window=1, groups=1, times=1, batch=1, widths=(2, 2), sinks=False)
@example(length=9, window=None, groups=2, times=2, batch=2, widths=(4, 6), sinks=True)
@given(
    length=st.integers(1, 30),
    window=st.none() | st.integers(1, 33),
    groups=st.integers(1, 3),
    times=st.integers(1, 3),
    batch=st.integers(1, 3),
    widths=st.tuples(st.sampled_from([2, 4, 8]), st.integers(1, 9)),
    sinks=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_window_length_grouping_and_sink_equals_the_masked_softmax(
    length: int, window: int | None, groups: int, times: int, batch: int, widths: tuple[int, int], sinks: bool
) -> None:
    given_ours = inputs(batch, length, groups * times, groups, *widths, sinks=sinks)
    given_plain = [x.detach().clone().requires_grad_() for x in given_ours]
    scale = 0.7
    ours = attend(*given_ours[:3], scale, window, given_ours[3] if sinks else None)
    theirs = plain(*given_plain[:3], scale, window, given_plain[3] if sinks else None)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for one, other in zip(given_ours, given_plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [None, 4])
def test_what_lies_ahead_or_before_the_window_has_no_effect(window: int | None) -> None:
    q, k, v, sinks = (x.detach() for x in inputs(1, 13, 2, 2, 4, 4, sinks=True))
    before = attend(q, k, v, 1.0, window, sinks)
    for changed in range(13):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, changed] += 5
        other_v[:, changed] -= 5
        after = attend(q, other_k, other_v, 1.0, window, sinks)
        moved = (after != before).flatten(2).any(-1)[0]
        sees = [n for n in range(13) if 0 <= n - changed < (window or 13)]
        assert moved.nonzero().flatten().tolist() == sees


def test_a_sink_that_outweighs_all_leaves_nothing_and_one_of_minus_infinity_nothing_out() -> None:
    q, k, v, _ = (x.detach() for x in inputs(1, 9, 2, 1, 4, 4, sinks=True))
    heavy = attend(q, k, v, 1.0, 4, torch.full((2,), 1e3, dtype=torch.float64))
    assert float(heavy.abs().max()) < 1e-12
    light = attend(q, k, v, 1.0, 4, torch.full((2,), -1e6, dtype=torch.float64))
    torch.testing.assert_close(light, attend(q, k, v, 1.0, 4), rtol=1e-12, atol=1e-12)
