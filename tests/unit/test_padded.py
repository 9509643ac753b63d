"""Rows that fill up an expert's share to one of few sizes change no number."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.sparse.copies import copies_of
from moe.sparse.padded import Padded, size_for
from moe.sparse.product import Products


@given(st.integers(0, 100_000))
def test_a_size_is_the_next_of_few(count: int) -> None:
    size = size_for(count)
    assert count <= size < count + max(8, count / 32 + 1)
    assert size % 8 == 0
    assert size_for(size) == size


def test_there_are_few_sizes() -> None:
    assert len({size_for(count) for count in range(1, 4097)}) == 32 + 4 * 32


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=40), st.booleans())
def test_rows_come_back_and_fillers_are_the_experts_own(ids: list[list[int]], masked: bool) -> None:
    ids_MK = torch.tensor(ids)
    copies = copies_of(ids_MK, 6, ids_MK != 2 if masked else None)
    padded = Padded.of(copies, Products(torch.bfloat16))
    weights_R = torch.arange(1.0, len(copies.source_of_row_R) + 1)
    spread_P = padded.spread(weights_R)
    assert padded.gather(spread_P).equal(weights_R)
    assert float(spread_P.sum()) == float(weights_R.sum())  # those that fill up weigh nothing
    assert padded.rows_per_bucket == [size_for(count) for count in copies.rows_per_bucket]
    sources = padded.source_of_row_P.split(padded.rows_per_bucket)
    for here, there in zip(sources, copies.source_of_row_R.split(copies.rows_per_bucket), strict=True):
        assert here[: len(there)].equal(there)
        assert set(here.tolist()) == set(there.tolist())


def test_only_products_with_a_kernel_for_each_size_are_padded() -> None:
    copies = copies_of(torch.tensor([[0], [2]]), 3)
    padded = Padded.of(copies, Products(torch.float32))
    weights_R = torch.ones(2)
    assert padded.rows_per_bucket == [1, 0, 1]
    assert padded.spread(weights_R) is weights_R
    assert padded.gather(weights_R) is weights_R
    assert Padded.of(copies, Products(torch.float32, by_onednn=True)).rows_per_bucket == [8, 0, 8]
