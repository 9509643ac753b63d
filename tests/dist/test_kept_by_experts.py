"""What experts keep for backward, measured on one rank and on several, beside what is said at a run's start."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.config import AttentionConfig, ModelConfig, MoEConfig
from moe.model import kept_by_experts, kept_sentence
from moe.sparse import ExpertLayout, SparseMoE
from tests.dist.layouts import tiny
from tests.harness import run_ranks

TOKENS, HIDDEN = 400, 48


def _config(latent: int | None, top_k: int) -> ModelConfig:
    moe = MoEConfig(num_experts=8, top_k=top_k, expert_intermediate_size=16, latent_size=latent)
    attention = AttentionConfig(num_heads=4)
    return ModelConfig(vocab_size=50, hidden_size=HIDDEN, num_layers=1, attention=attention, moe=moe)


def _kept(layer: SparseMoE, x: Tensor) -> int:
    """Bytes that the experts' own step keeps, without parameters and the input of the layer."""
    others = {tensor.data_ptr() for tensor in (x, *layer.parameters())}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in others and tensor.ndim == 2:
            found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    experts, forward = layer.experts, layer.experts.forward

    def watched(*arguments: object) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return forward(*arguments)

    experts.forward = watched
    layer(x)
    return sum(found.values())


def _measure(rank: int, world_size: int) -> None:
    for latent, top_k in ((None, 2), (12, 2), (None, 4)):
        config = _config(latent, top_k)
        assert config.moe is not None
        for recompute in ("none", "experts"):
            group = dist.group.WORLD if world_size > 1 else None
            layout = ExpertLayout(8, world_size, rank, group)
            torch.manual_seed(3)
            layer = SparseMoE(HIDDEN, config.moe, layout, recompute=recompute == "experts")
            for parameter in layer.parameters():
                torch.nn.init.normal_(parameter)
            x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(rank))
            kept = torch.tensor(_kept(layer, x.requires_grad_()))
            if world_size > 1:
                dist.all_reduce(kept)
            stated = kept_by_experts(config, "fp32", recompute, world_size) * TOKENS * world_size
            assert int(kept) <= stated, (latent, top_k, recompute)
            # On one rank to the byte; on several no token visits more ranks than it has choices, but some fewer.
            assert int(kept) >= (1.0 if world_size == 1 else 0.7) * stated, (latent, top_k, recompute)
            assert (stated == 0) == (world_size == 1 and recompute == "experts" and latent is None)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_experts_keep_is_what_is_stated(world_size: int, tmp_path: Path) -> None:
    run_ranks(_measure, world_size, tmp_path, world_size)


def test_a_run_says_what_its_experts_keep() -> None:
    assert kept_sentence(tiny(model={"moe": None, "intermediate_size": 40})) == ""
    alone, shared = (kept_sentence(tiny(parallel={"expert_parallel_size": ep})) for ep in (1, 2))
    assert re.fullmatch(
        r"routed experts keep \d+ bytes of activations per token for backward, \S+ GB a micro-batch", alone
    )
    assert "for backward at most, the mean over ranks, " in shared
