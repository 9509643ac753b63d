"""Adapted experts on a CUDA device, where torch's grouped kernel multiplies; on CPU by the loop, and by that kernel."""

import pytest
import torch

from moe.config import MoEConfig
from moe.sparse import ExpertLayout, SparseMoE, lora
from moe.sparse.reference import ReferenceWeights, sparse_layer
from tests.gpu.test_cuda import CUDA

RANK, SCALE = 8, 0.5


@pytest.mark.parametrize("one_kernel", [False, True], ids=["", "one kernel"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_adapted_layer_equals_reference(
    device: str, dtype: torch.dtype, bound: float, one_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if one_kernel and (device, dtype) != ("cuda", torch.float32):  # there is none for it
        monkeypatch.setattr(lora, "_in_one_kernel", lambda x, weight: True)
    draw = torch.Generator().manual_seed(0)
    config = MoEConfig(num_experts=8, top_k=2, expert_intermediate_size=16)
    layer = SparseMoE(32, config, ExpertLayout(8)).requires_grad_(False)
    lora.adapt_experts(layer.experts, RANK, SCALE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    layer = layer.to(dtype)
    x = torch.randn(64, 32, generator=draw).to(dtype)
    grad = torch.randn(64, 32, generator=draw).to(dtype)
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.experts.named_parameters()}
    whole = {
        name: leaves[name] + SCALE * leaves[name + lora.B] @ leaves[name + lora.A]
        for name in ("gate_up", "down")
    }
    weights = ReferenceWeights(layer.router.weight.double(), whole["gate_up"], whole["down"])
    expected = sparse_layer(x.double(), weights, config)
    expected.y_TD.backward(grad.double())

    y, _ = layer.to(device)(x.to(device))
    y.backward(grad.to(device))
    found = {
        "y": y,
        **{name: p.grad for name, p in layer.experts.named_parameters() if lora.is_adapter(name)},
    }
    right = {
        "y": expected.y_TD,
        **{name: leaf.grad for name, leaf in leaves.items() if lora.is_adapter(name)},
    }
    assert len(right) == 5
    for name, tensor in right.items():
        ours = found[name]
        assert tensor is not None
        assert ours is not None
        distance = float((ours.detach().cpu().double() - tensor.detach()).norm() / tensor.detach().norm())
        assert distance < bound, (name, distance)
