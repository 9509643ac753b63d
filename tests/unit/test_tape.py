"""Pieces of arrays that lie end to end, wherever the arrays meet."""

from itertools import cycle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.data.tape import Tape

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


@given(st.data(), SIZES, st.sampled_from([["uint16"], ["int32"], ["int32", "uint16"]]))
def test_pieces_are_what_one_array_would_give(
    data: st.DataObject, sizes: list[int], dtypes: list[str]
) -> None:
    whole_N = np.arange(sum(sizes), dtype=dtypes[0])
    arrays = np.split(whole_N, np.cumsum(sizes)[:-1])
    tape = Tape([array.astype(dtype) for array, dtype in zip(arrays, cycle(dtypes), strict=False)])
    place = st.integers(0, len(whole_N))
    bounds = [sorted(pair) for pair in data.draw(st.lists(st.tuples(place, place), min_size=1))]
    found_N = tape.pieces([start for start, _ in bounds], [stop - start for start, stop in bounds])
    if len(dtypes) == 1:
        assert found_N.dtype == whole_N.dtype
    assert found_N.tolist() == [token for start, stop in bounds for token in range(start, stop)]
    assert np.concatenate([whole_N[:0], *tape.views(*bounds[0])]).tolist() == list(range(*bounds[0]))


@pytest.mark.parametrize("sizes", [[9], [4, 5]])
@pytest.mark.parametrize("piece", [(8, 2), (9, 1), (40, 3)])
def test_nothing_lies_beyond_the_end(sizes: list[int], piece: tuple[int, int]) -> None:
    tape = Tape([np.zeros(size, dtype=np.uint16) for size in sizes])
    with pytest.raises(IndexError):
        tape.pieces([0, piece[0]], [3, piece[1]])
