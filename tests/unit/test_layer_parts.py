"""How a sparse layer is put together: which experts a rank holds, and what is done while rows travel."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from moe.config import MoEConfig
from moe.errors import ConfigError
from moe.sparse import ExpertLayout, SparseMoE
from moe.sparse.dispatch import Dispatched, Local
from moe.sparse.experts import Rows


@pytest.mark.parametrize(
    ("experts", "size", "rank", "said"),
    [
        (8, 3, 0, "expert_parallel_size is 3, but 8 experts cannot be shared equally"),
        (8, 0, 0, "expert_parallel_size is 0"),
        (8, 4, 4, "rank 4 is not one of a group of 4. Use 0 to 3."),
        (8, 4, -1, "rank -1"),
    ],
)
def test_experts_that_cannot_be_shared_are_refused(experts: int, size: int, rank: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ExpertLayout(experts, size, rank)


@dataclass
class Watched:
    """A way between tokens and experts that notes when rows leave and when they are asked for."""

    layout: ExpertLayout
    events: list[str] = field(default_factory=list)

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, sent_TK: Tensor | None = None
    ) -> Dispatched:
        self.events.append("rows leave")
        return _Watched(Local(self.layout).dispatch(x_TD, ids_TK, weights_TK, sent_TK), self.events)


@dataclass
class _Watched:
    inner: Dispatched
    events: list[str]

    def rows(self) -> Rows:
        self.events.append("rows are waited for")
        return self.inner.rows()

    def combine(self, y_MD: Tensor) -> Tensor:
        return self.inner.combine(y_MD)


def test_the_shared_expert_works_while_rows_travel() -> None:
    config = MoEConfig(num_experts=4, top_k=2, expert_intermediate_size=5, shared_expert_intermediate_size=3)
    watched = Watched(ExpertLayout(4))
    layer = SparseMoE(6, config, watched.layout, dispatcher=watched)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    assert layer.shared_expert is not None
    layer.shared_expert.register_forward_hook(lambda *_: watched.events.append("the shared expert"))
    layer(torch.ones(9, 6))
    assert watched.events == ["rows leave", "the shared expert", "rows are waited for"]
