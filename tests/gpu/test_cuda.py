"""The same code on a CUDA device; collected everywhere, skipped where there is none."""

from pathlib import Path

import pytest
import torch

from moe.config import MoEConfig
from moe.sparse import ExpertLayout, SparseMoE
from moe.sparse.reference import ReferenceWeights, sparse_layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none here"),
]


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 4e-2)]
)
def test_layer_equals_reference_on_cuda(dtype: torch.dtype, bound: float) -> None:
    draw = torch.Generator().manual_seed(0)
    layer = SparseMoE(32, MoEConfig(num_experts=8, top_k=2, expert_intermediate_size=16), ExpertLayout(8))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    layer = layer.to(dtype)
    x = torch.randn(64, 32, generator=draw).to(dtype)
    weights = ReferenceWeights(
        router_ED=layer.router.weight.detach().double(),
        gate_up_E2FD=layer.experts.gate_up.detach().double(),
        down_EDF=layer.experts.down.detach().double(),
    )
    expected = sparse_layer(x.double(), weights, top_k=2, normalize=True).y_TD
    y, record = layer.cuda()(x.cuda())
    y.float().square().mean().backward()
    assert float((y.detach().cpu().double() - expected).abs().max() / expected.abs().max()) < bound
    assert int(record.counts_E.sum()) == 128
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_a_recipe_trains_on_cuda_in_bf16(tmp_path: Path) -> None:
    from moe import dist
    from tests.dist.layouts import curve, start, tiny, train

    run = tiny(run_dir=str(tmp_path), train={"precision": "bf16", "micro_batch_size": 4})
    with dist.start(run.parallel) as ranks:
        assert ranks.device.type == "cuda"
        found = curve(train(start(run, ranks), 0, 20))
    assert found.cross_entropy[-1] < found.cross_entropy[0] - 0.5
