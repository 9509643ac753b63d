"""Torch's grouped GEMM path, as CUDA takes it, beside the loop: same rows, same gradients."""

import pytest
import torch

from moe.sparse.experts import Experts, grouped_swiglu
from moe.sparse.plan import ExpertLayout


@pytest.mark.parametrize("rows", [[5, 0, 9, 2], [16, 0, 0, 0], [1, 1, 1, 1]], ids=str)
def test_grouped_gemm_equals_the_loop(rows: list[int]) -> None:
    draw = torch.Generator().manual_seed(1)
    experts = Experts(16, 8, ExpertLayout(4))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=draw)
    x = torch.randn(sum(rows), 16, generator=draw)
    grad = torch.randn(x.shape, generator=draw)
    found = []
    for path in (experts, lambda x, r: grouped_swiglu(x, r, experts.gate_up, experts.down)):
        leaf = x.clone().requires_grad_()
        experts.zero_grad()
        y = path(leaf, rows)
        y.backward(grad)
        found.append((y.detach(), leaf.grad, experts.gate_up.grad, experts.down.grad))
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
