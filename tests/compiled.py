"""Desks that can be had here: without a C++ compiler there are no compiled ones, and no test of them."""

import pytest

from moe.sparse import kernels
from moe.sparse.compiled import CompiledDesk
from moe.sparse.desk import Desk

COMPILED: list[type[Desk]] = [] if kernels.library() is None else [CompiledDesk]

KINDS = [
    pytest.param(Desk, id="by torch"),
    pytest.param(
        CompiledDesk,
        id="compiled",
        marks=pytest.mark.skipif(not COMPILED, reason="rows.cpp cannot be compiled here: no C++ compiler"),
    ),
]
