"""The model's parts by their laws: cross-entropy, recomputation, counts, initialisation, causality."""

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import AttentionConfig, ModelConfig, MoEConfig
from moe.config.attention import RopeScaling
from moe.model import ModelOutput, Transformer, count, initialize, kept_by_experts
from moe.model import head as heads
from moe.model.head import Head
from moe.model.rope import rotation
from moe.sparse import ExpertLayout
from moe.sparse.product import Products
from tests.onednn import needs_onednn


def _config(**changes: Any) -> ModelConfig:
    page: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_layers": 3,
        "attention": AttentionConfig(num_heads=4, num_kv_heads=2),
        "moe": MoEConfig(num_experts=4, top_k=2, expert_intermediate_size=8),
    }
    return ModelConfig(**{**page, **changes})


VARIANTS = {
    "GPT-OSS's experts, latent": {
        "moe": MoEConfig(
            num_experts=4,
            top_k=2,
            expert_intermediate_size=8,
            expert_activation="gpt_oss",
            activation_limit=0.01,
            expert_bias=True,
            latent_size=6,
        )
    },
    "sparse": {},
    "first dense": {
        "intermediate_size": 24,
        "moe": MoEConfig(num_experts=4, top_k=2, expert_intermediate_size=8, first_k_dense=1),
    },
    "shared gated, biases": {
        "moe": MoEConfig(
            num_experts=4,
            top_k=2,
            expert_intermediate_size=8,
            shared_expert_intermediate_size=12,
            shared_expert_gate=True,
        ),
        "attention": AttentionConfig(num_heads=4, num_kv_heads=2, qkv_bias=True, qk_norm=False),
    },
    "dense": {"intermediate_size": 24, "moe": None},
    "tied": {"tie_embeddings": True},
    "latent, predicting, LayerNorm around": {
        "norm": "layer",
        "norm_placement": "sandwich",
        "head_bias": True,
        "prediction_depth": 2,
        "attention": AttentionConfig.model_validate(
            {
                "num_heads": 4,
                "qk_norm": "none",
                "qkv_bias": True,
                "output_bias": True,
                "output_gate": True,
                "sinks": True,
                "latent": {
                    "kv_rank": 6,
                    "query_rank": 10,
                    "nope_head_dim": 4,
                    "rope_head_dim": 4,
                    "value_head_dim": 6,
                },
            }
        ),
    },
    "windows, full norm": {
        "attention": AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            qk_norm="full",
            sliding_window=5,
            window_layers=(1,),
            rope_fraction=0.5,
        ),
        "moe": MoEConfig(
            num_experts=4, top_k=2, expert_intermediate_size=8, router_bias=True, dense_layers=(1,)
        ),
        "intermediate_size": 24,
    },
    "wide heads": {"attention": AttentionConfig(num_heads=2, head_dim=10)},
}


@pytest.fixture(params=VARIANTS, name="config")
def _variant(request: pytest.FixtureRequest) -> ModelConfig:
    return _config(**VARIANTS[request.param])


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(50, (2, 12), generator=draw)
    labels = torch.randint(50, (2, 12), generator=draw)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 5:] = False
    return ids, labels, mask


def test_counts_are_those_of_the_built_model(config: ModelConfig) -> None:
    model = Transformer(config)
    counted = count(config, 12)
    assert counted.total_parameters == sum(p.numel() for p in model.parameters())
    inactive = 0
    if config.moe is not None:
        experts = [p for name, p in model.named_parameters() if ".experts." in name]
        share = (config.moe.num_experts - config.moe.top_k) / config.moe.num_experts
        inactive = int(sum(p.numel() for p in experts) * share)
    assert counted.active_parameters == counted.total_parameters - inactive


def test_longrope_divides_each_frequency_by_the_numbers_for_the_length() -> None:
    """Against its formula: stock 5.23 takes the short factors whatever the length for Phi-3.5-MoE."""
    scaling = RopeScaling(
        kind="longrope",
        factor=2.0,
        original_max_sequence_length=6,
        short_factors=(1.0, 1.5),
        long_factors=(2.0, 8.0),
        short_mscale=1.1,
        long_mscale=1.3,
    )
    for length, factors, mscale in ((6, (1.0, 1.5), 1.1), (7, (2.0, 8.0), 1.3)):
        angle_Sp = torch.arange(length).unsqueeze(1) / torch.tensor(
            [factors[0] * 100.0 ** (0 / 4), factors[1] * 100.0 ** (2 / 4)]
        )
        turn = rotation(length, 4, 100.0, torch.device("cpu"), scaling)
        torch.testing.assert_close(turn.cos_Sr, angle_Sp.cos().repeat(1, 2) * mscale)
        torch.testing.assert_close(turn.sin_Sr, angle_Sp.sin().repeat(1, 2) * mscale)


def test_flops_of_published_models_are_reproduced() -> None:
    """Qwen3-30B-A3B and 235B-A22B at 4096 tokens: 23.08 and 148.3 GFLOP a token (published: 23.0, 147.8-148.2)."""
    small = ModelConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_layers=48,
        attention=AttentionConfig(num_heads=32, num_kv_heads=4, head_dim=128),
        moe=MoEConfig(num_experts=128, top_k=8, expert_intermediate_size=768),
    )
    large = ModelConfig(
        vocab_size=151936,
        hidden_size=4096,
        num_layers=94,
        attention=AttentionConfig(num_heads=64, num_kv_heads=4, head_dim=128),
        moe=MoEConfig(num_experts=128, top_k=8, expert_intermediate_size=1536),
    )
    assert count(small, 4096).flops_per_token / 1e9 == pytest.approx(23.08, abs=0.05)
    assert count(large, 4096).flops_per_token / 1e9 == pytest.approx(148.3, abs=0.2)
    assert count(small, 4096).total_parameters / 1e9 == pytest.approx(30.5, abs=0.1)
    assert count(small, 4096).active_parameters / 1e9 == pytest.approx(3.35, abs=0.05)


def test_deepseek_v3_is_counted_with_its_latents_and_its_prediction_module() -> None:
    """250.5 GFLOP a token, 260.6 with one prediction module (published: 249.5-249.7, 259.8-260.6)."""
    latent = {
        "kv_rank": 512,
        "query_rank": 1536,
        "nope_head_dim": 128,
        "rope_head_dim": 64,
        "value_head_dim": 128,
    }
    page = {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "num_layers": 61,
        "intermediate_size": 18432,
        "attention": {"num_heads": 128, "qk_norm": "none", "latent": latent},
        "moe": {
            "num_experts": 256,
            "top_k": 8,
            "expert_intermediate_size": 2048,
            "first_k_dense": 3,
            "shared_expert_intermediate_size": 2048,
        },
    }
    counted = count(ModelConfig.model_validate(page), 4096)
    assert counted.total_parameters / 1e9 == pytest.approx(671, abs=0.5)
    assert counted.active_parameters / 1e9 == pytest.approx(37.5, abs=0.5)
    assert counted.flops_per_token / 1e9 == pytest.approx(250.5, abs=0.1)
    further = count(ModelConfig.model_validate({**page, "prediction_depth": 1}), 4096)
    assert further.flops_per_token / 1e9 == pytest.approx(260.6, abs=0.1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 30), st.integers(1, 9), st.integers(0, 999))
def test_chunked_cross_entropy_is_the_plain_one(tokens: int, vocabulary: int, chunk: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    head = Head(6, vocabulary).double()
    torch.nn.init.normal_(head.weight, generator=draw)
    h = torch.randn(tokens, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,), generator=draw)
    mask = torch.rand(tokens, generator=draw) < 0.7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "CHUNK_ELEMENTS", chunk * vocabulary)
        loss = head(h, labels, mask)
        (loss * 0.7).backward()
    got = (h.grad, head.weight.grad)
    h.grad = head.weight.grad = None
    plain = F.cross_entropy(head(h)[mask], labels[mask], reduction="sum")
    (plain * 0.7).backward()
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(got, (h.grad, head.weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_cross_entropy_holds_one_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor as large as [T, V] is ever made, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", 1 << 12)
    head = Head(8, 256)
    torch.nn.init.normal_(head.weight)
    h = torch.randn(512, 8, requires_grad=True)
    with Watch():
        head(h, torch.zeros(512, dtype=torch.int64)).backward()
    assert largest <= max(1 << 12, 512 * 8)


def test_recomputation_changes_no_bit_and_counts_once(config: ModelConfig) -> None:
    ids, labels, mask = _batch()
    grads, counts = [], []
    for recompute in ("none", "block", "experts"):
        model = Transformer(config, recompute=recompute)
        initialize(model, 7)
        output = model(ids, labels, mask)
        assert isinstance(output, ModelOutput)
        aux = sum((r.log_sum_exp_T.square().sum() for r in output.records), torch.zeros(()))
        further = 0.0 if output.further is None else output.further
        (output.cross_entropy + aux + further).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        counts.append([r.counts_E.tolist() for r in output.records])
    assert counts[0] == counts[1] == counts[2]
    for name, grad in grads[0].items():
        assert grad is not None
        for other in grads[1:]:
            assert torch.equal(grad, other[name]), name  # type: ignore[arg-type]  # not None, as above


@pytest.mark.parametrize(
    ("precision", "products", "fillers"),
    [
        ("fp32", Products(torch.float32), 0),
        pytest.param("fp32", Products(torch.float32, by_onednn=True), 7, marks=needs_onednn),
        ("bf16", Products(torch.float32), 0),
        ("bf16", Products(torch.bfloat16), 7),
    ],
)
def test_what_experts_keep_for_backward_is_what_is_stated(
    config: ModelConfig,
    precision: Literal["fp32", "bf16"],
    products: Products,
    fillers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all tensors that autograd keeps, recomputing the experts saves the stated bytes, and rows that fill up."""
    monkeypatch.setattr(Products, "of", lambda like, rows, weight: products)
    ids, labels, _ = _batch()
    kept = []
    for recompute in ("none", "experts"):
        model = Transformer(config, recompute=recompute)
        initialize(model, 7)
        model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        storages: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, storages: dict[int, torch.Tensor] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(ids, labels)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()))
    stated = kept_by_experts(config, precision, "none") - kept_by_experts(config, precision, "experts")
    fill = 0
    if config.moe is not None and fillers:
        a_row = stated // len(config.sparse_layers) // config.moe.top_k if config.sparse_layers else 0
        fill = a_row * fillers * len(config.sparse_layers) * config.moe.num_experts
    assert 0 <= kept[0] - kept[1] - stated * ids.numel() <= fill
    assert kept_by_experts(config, precision, "block") == 0


def test_experts_are_initialised_alike_at_any_expert_parallel_size() -> None:
    config = _config()
    whole = Transformer(config)
    initialize(whole, 7)
    reference = dict(whole.named_parameters())
    for rank in range(2):
        part = Transformer(config, ExpertLayout(4, size=2, rank=rank))
        initialize(part, 7)
        for name, parameter in part.named_parameters():
            expected = reference[name]
            if ".experts." in name:
                expected = expected[rank * 2 : rank * 2 + 2]
            assert torch.equal(parameter, expected), name


def test_initial_weights_have_the_stated_spread() -> None:
    config = _config(hidden_size=128, moe=MoEConfig(num_experts=4, top_k=2, expert_intermediate_size=128))
    model = Transformer(config)
    initialize(model, 7)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        narrow = name.endswith(("attention.output.weight", "experts.down"))
        expected = 0.02 / (6**0.5) if narrow else 0.02
        assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.1), name
    experts = model.layers[0].ffn.experts.gate_up  # type: ignore[union-attr]  # a sparse layer
    assert not torch.equal(experts[0], experts[1])  # type: ignore[index]  # a tensor


def test_another_seed_gives_other_weights_and_the_same_seed_the_same() -> None:
    models = [Transformer(_config()) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initialize(model, seed)
    assert torch.equal(models[0].embed.weight, models[1].embed.weight)
    assert not torch.equal(models[0].embed.weight, models[2].embed.weight)


def test_the_future_is_not_seen(config: ModelConfig) -> None:
    model = Transformer(config).double()
    initialize(model, 7)
    ids, *_ = _batch()
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 50
    with torch.no_grad():
        a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :8], b[:, :8], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a[:, 8:], b[:, 8:])


def test_masked_positions_add_to_no_loss_and_no_count(config: ModelConfig) -> None:
    model = Transformer(config).double()
    initialize(model, 7)
    ids, labels, mask = _batch()
    other = labels.clone()
    other[~mask] = (other[~mask] + 3) % 50
    changed = ids.clone()
    changed[~mask] = (changed[~mask] + 3) % 50
    a, b = model(ids, labels, mask), model(changed, other, mask)
    torch.testing.assert_close(a.cross_entropy, b.cross_entropy)
    for one, two in zip(a.records, b.records, strict=True):
        assert torch.equal(one.counts_E, two.counts_E)
        assert int(one.counts_E.sum()) == int(mask.sum()) * 2
