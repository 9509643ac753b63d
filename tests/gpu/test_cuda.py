"""The same code on a CUDA device; collected everywhere, there skipped where there is none, and run on CPU too."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe.checkpoint.save import HostCopies
from moe.config import MoEConfig
from moe.sparse import ExpertLayout, Jitter, SparseMoE, choice
from moe.sparse.activation import GatedUnit
from moe.sparse.copies import copies_of
from moe.sparse.experts import Experts, Rows
from moe.sparse.reference import ReferenceWeights, sparse_layer
from tests.names import REFERENCE

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none here"),
    ],
)
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "GPT-OSS's experts": {"expert_activation": "gpt_oss", "activation_limit": 0.5, "expert_bias": True},
    "shared, latent": {"shared_expert_intermediate_size": 24, "latent_size": 16},
    "too narrow for grouped GEMMs": {"expert_intermediate_size": 12},
}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 4e-2)], ids=str
)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_layer_equals_reference(
    device: str, dtype: torch.dtype, bound: float, shape: str, masked: bool, recompute: bool
) -> None:
    draw = torch.Generator().manual_seed(0)
    config = MoEConfig(num_experts=8, top_k=2, **{"expert_intermediate_size": 16, **SHAPES[shape]})
    layer = SparseMoE(32, config, ExpertLayout(8), recompute=recompute)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    layer = layer.to(dtype)
    x = torch.randn(64, 32, generator=draw).to(dtype)
    grad = torch.randn(64, 32, generator=draw).to(dtype)
    mask = torch.arange(64) % 5 > 0 if masked else None
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    weights = ReferenceWeights(**{REFERENCE[name]: leaf for name, leaf in leaves.items()})
    expected = sparse_layer(x.double(), weights, config, mask_T=mask)
    expected.y_TD.backward(grad.double())

    y, record = layer.to(device)(x.to(device), None if mask is None else mask.to(device))
    y.backward(grad.to(device))
    assert int(record.counts_E.sum()) == 2 * (64 if mask is None else int(mask.sum()))
    found = {"y": y, **{name: p.grad for name, p in layer.named_parameters()}}
    right = {"y": expected.y_TD, **{name: leaf.grad for name, leaf in leaves.items()}}
    for name, tensor in right.items():
        ours = found[name]
        assert tensor is not None
        assert ours is not None
        distance = float((ours.detach().cpu().double() - tensor.detach()).norm() / tensor.detach().norm())
        assert distance < bound, (name, distance)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_gradient_of_a_bias_in_bf16_rounds_once(device: str) -> None:
    """A sum of thousands of ones: added up in bf16 it would end at 256."""
    experts = Experts(16, 8, ExpertLayout(4), GatedUnit(1.702, 1.0), bias=True).to(device, torch.bfloat16)
    for parameter in experts.parameters():
        torch.nn.init.constant_(parameter, 0.125)
    grads = []
    for rows in (4, 4000):
        experts.zero_grad()
        copies = copies_of((torch.arange(rows, device=device) % 4).unsqueeze(1), 4)
        ones = torch.ones(rows, 16, device=device, dtype=torch.bfloat16)
        y = experts(Rows(ones, torch.ones(rows, device=device), copies))
        y.backward(torch.ones_like(y))
        grads.append([bias.grad.float() for bias in (experts.gate_up_bias, experts.down_bias)])
    for one_row, thousand in zip(*grads, strict=True):
        torch.testing.assert_close(thousand, 1000 * one_row, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("device", [CUDA])
def test_jitter_and_choices_are_those_of_the_cpu(device: str) -> None:
    """The hash wraps around in int64 alike, so a run may go on with other devices."""
    here, there = (Jitter.of(0.1, 2**62 + 5, range(7, 99), where).of_layer(3) for where in ("cpu", device))
    assert torch.equal(here.factors(33, torch.float32), there.factors(33, torch.float32).cpu())
    scores = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(64) % 5 > 0
    for chosen in (choice.by_experts, choice.in_turn):
        ours, theirs = chosen(scores, mask, 2), chosen(scores.to(device), mask.to(device), 2)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, check_device=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none here")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_recipe_trains_on_cuda_in_bf16(optimizer: str, tmp_path: Path) -> None:
    from moe import dist
    from tests.dist.layouts import OPTIMIZER, curve, start, tiny, train

    settings = {"precision": "bf16", "micro_batch_size": 4, "optimizer": {**OPTIMIZER, "kind": optimizer}}
    run = tiny(run_dir=str(tmp_path), train=settings)
    with dist.start(run.parallel) as ranks:
        assert ranks.device.type == "cuda"
        found = curve(train(start(run, ranks), 0, 20))
    assert found.cross_entropy[-1] < found.cross_entropy[0] - 0.5


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_copies_of_a_state_stay_what_they_were_in_memory_that_is_used_again(device: str) -> None:
    copies, live = HostCopies(), torch.arange(1000.0, device=device)
    first = copies.take([("a", live), ("b", live[:7])])
    live.mul_(0)  # the next step
    assert torch.equal(first["a"], torch.arange(1000.0))
    assert torch.equal(first["b"], torch.arange(7.0))
    assert first["a"].is_pinned() == (device == "cuda")
    again = copies.take([("a", live)])
    assert again["a"].data_ptr() == first["a"].data_ptr()
    assert torch.equal(again["a"], torch.zeros(1000))
