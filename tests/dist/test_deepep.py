"""The DeepEP dispatcher over a buffer that keeps DeepEP's contract with gloo: the same layer as by all-to-all.

Real DeepEP needs GPUs with NVLink or RDMA; what is checked here is our side: ids, weights, handles, gradients.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.config import MoEConfig
from moe.errors import ConfigError
from moe.sparse import Capacity, ExpertLayout, SparseMoE
from moe.sparse.deepep import DeepEP, check_installed
from tests.harness import run_ranks

EXPERTS, TOP_K, WIDTH = 8, 3, 6


class GlooBuffer:
    """`deep_ep.Buffer` as its documentation states it, by gathering everything everywhere."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        held = num_experts // self.world_size
        ranks = torch.where(topk_idx >= 0, topk_idx // held, -1)
        in_rank = torch.stack([(ranks == rank).any(1) for rank in range(self.world_size)], 1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return in_rank.sum(0), None, per_expert, in_rank, None

    def dispatch(
        self, x: Tensor, handle: Any = None, topk_idx: Any = None, topk_weights: Any = None, **layout: Any
    ) -> tuple[Any, ...]:
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            mine = [everyone[:, self.rank] for everyone in handle]
            return (
                torch.cat([t[m] for t, m in zip(self._all(x), mine, strict=True)]),
                None,
                None,
                None,
                None,
                None,
            )
        handle = self._all(layout["is_token_in_rank"])
        mine = [everyone[:, self.rank] for everyone in handle]
        held = len(layout["num_tokens_per_expert"]) // self.world_size

        def received(tensor: Tensor) -> Tensor:
            return torch.cat([t[m] for t, m in zip(self._all(tensor), mine, strict=True)])

        ids = received(topk_idx)
        here = (ids >= 0) & (ids // held == self.rank)
        local = torch.where(here, ids % held, -1)
        counts = torch.bincount(local[here], minlength=held).tolist()
        weights = torch.where(here, received(topk_weights), 0)
        return received(x), local, weights, counts, handle, None

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> tuple[Any, ...]:
        def summed(rows: Tensor) -> Tensor:
            tokens = handle[self.rank].shape[0]
            out = rows.new_zeros(tokens, rows.shape[1])
            for rank, theirs in enumerate(self._all(rows)):
                start = sum(int(handle[source][:, rank].sum()) for source in range(self.rank))
                mine = handle[self.rank][:, rank]
                out[mine] += theirs[start : start + int(mine.sum())]
            return out

        return summed(x), None if topk_weights is None else summed(topk_weights), None

    def _all(self, tensor: Tensor) -> list[Tensor]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, tensor.detach())
        return gathered


def _run(layer: SparseMoE, rank: int, masked: bool) -> dict[str, Tensor | None]:
    draw = torch.Generator().manual_seed(10 + rank)
    x = torch.randn(9, WIDTH, generator=draw).requires_grad_()
    mask = torch.arange(9) % 3 > 0 if masked else None
    y, _ = layer(x, mask)
    y.backward(torch.randn(y.shape, generator=draw))
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def _compare(rank: int, world_size: int, masked: bool, capacity: Capacity | None) -> None:
    config = MoEConfig(
        num_experts=EXPERTS, top_k=TOP_K, expert_intermediate_size=4, shared_expert_intermediate_size=4
    )
    layout = ExpertLayout(EXPERTS, world_size, rank, dist.group.WORLD)
    plain = SparseMoE(WIDTH, config, layout, capacity)
    draw = torch.Generator().manual_seed(rank)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, generator=draw)
    other = SparseMoE(
        WIDTH, config, layout, capacity, dispatcher=DeepEP(layout, GlooBuffer(rank, world_size))
    )
    other.load_state_dict(plain.state_dict())
    expected, found = _run(plain, rank, masked), _run(other, rank, masked)
    for name, value in expected.items():
        assert value is not None, name
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("masked", "capacity"), [(False, None), (True, Capacity(0.8, "score"))], ids=["plain", "masked, dropped"]
)
def test_deepep_gives_the_layer_that_all_to_all_gives(
    world_size: int, masked: bool, capacity: Capacity | None, tmp_path: Path
) -> None:
    run_ranks(_compare, world_size, tmp_path, world_size, masked, capacity)


def test_without_deepep_the_way_out_is_named() -> None:
    with pytest.raises(ConfigError, match=r"deep_ep is not installed.*parallel\.dispatch=all_to_all"):
        check_installed()
