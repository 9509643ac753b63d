"""Tokens to their experts and back: nothing moves on one rank; an uneven all-to-all each way on several.

T tokens, D width, K choices, N rows sent, M rows received, R rows at their experts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe.sparse.collectives import Exchange
from moe.sparse.copies import copies_of, copy_rows, sum_rows
from moe.sparse.experts import Rows
from moe.sparse.plan import ExpertLayout, Trip, plan_trip


class Dispatched(Protocol):
    """Tokens on their way."""

    def rows(self) -> Rows:
        """What arrived for the experts here. Work done before this call overlaps with the journey."""

    def combine(self, y_MD: Tensor) -> Tensor:
        """[M, D] -> [T, D]: what the experts made of the rows, brought home; each token's parts added up."""


class Dispatcher(Protocol):
    """A way between tokens and experts."""

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, sent_TK: Tensor | None = None
    ) -> Dispatched:
        """Send tokens [T, D] and the weights of their choices; those outside `sent_TK` (bool) stay at home."""


class Local:
    """All experts are here: they read tokens where they are."""

    def __init__(self, layout: ExpertLayout) -> None:
        self.layout = layout

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, sent_TK: Tensor | None = None
    ) -> "_Here":
        copies = copies_of(ids_TK, self.layout.num_experts, sent_TK)
        return _Here(Rows(x_TD, weights_TK.flatten()[copies.choice_of_row_R], copies))


@dataclass(frozen=True)
class _Here:
    tokens: Rows

    def rows(self) -> Rows:
        return self.tokens

    def combine(self, y_MD: Tensor) -> Tensor:
        return y_MD


class AllToAll:
    """Sends what the routing asks for, whatever the load; nothing is padded to a maximum.

    A token travels once to each rank that holds any of its experts, not once for each choice, and comes back as
    one weighted sum: with 8 choices over 8 ranks that is a third fewer rows, over 2 ranks three quarters fewer.
    """

    def __init__(self, layout: ExpertLayout) -> None:
        self.layout = layout

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, sent_TK: Tensor | None = None
    ) -> "_Away":
        trip = plan_trip(ids_TK, self.layout, sent_TK)
        rows_ND = copy_rows(x_TD, trip.to_rank)
        # Ids go beside the weights they belong to; float32 is exact up to 2^24 experts.
        weights_NK = copy_rows(weights_TK, trip.to_rank)
        choices_N2K = torch.cat([weights_NK, trip.local_ids_NK.to(weights_NK.dtype)], dim=1)
        ways = [Exchange(trip.send_splits, trip.receive_splits, self.layout.group) for _ in range(2)]
        started = [way.start(rows) for way, rows in zip(ways, (choices_N2K, rows_ND), strict=True)]
        return _Away(self.layout, trip, ways, started)


@dataclass(frozen=True)
class _Away:
    layout: ExpertLayout
    trip: Trip
    ways: list[Exchange]
    started: list[Tensor]

    def rows(self) -> Rows:
        choices_M2K, source_MD = (way.wait(rows) for way, rows in zip(self.ways, self.started, strict=True))
        weights_MK, ids_MK = choices_M2K.chunk(2, dim=1)
        ids_MK, held = ids_MK.detach().long(), self.layout.num_local_experts
        copies = copies_of(ids_MK, held, ids_MK < held, lambda: self.trip.num_choices)
        return Rows(source_MD, weights_MK.flatten()[copies.choice_of_row_R], copies)

    def combine(self, y_MD: Tensor) -> Tensor:
        home = Exchange(self.trip.receive_splits, self.trip.send_splits, self.layout.group)
        return sum_rows(home.wait(home.start(y_MD)), self.trip.to_rank)
