"""The routers' noise: what it is, what it hangs on, and what it leaves alone."""

from typing import Any

import pytest
import torch

from moe.config import AttentionConfig, ModelConfig, MoEConfig
from moe.model import ModelOutput, Transformer, initialize
from moe.sparse import ExpertLayout, Jitter, SparseMoE
from moe.sparse.jitter import element

MOE = MoEConfig(num_experts=4, top_k=2, expert_intermediate_size=8)


def test_the_hash_is_splitmix64() -> None:
    """The first numbers from seed 1234567, as the generator's author and Rosetta Code print them."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    ours = element(1234567, torch.arange(5))
    assert [number % 2**64 for number in ours.tolist()] == published


def test_factors_are_uniform_around_one() -> None:
    factors = Jitter.of(0.1, 5, range(2000)).of_layer(1).factors(129, torch.float64)
    assert factors.shape == (2000, 129)
    assert 0.9 < float(factors.min()) < 0.90001
    assert 1.09999 < float(factors.max()) < 1.1
    spread = (factors - 1) / 0.1
    assert abs(float(spread.mean())) < 0.005
    assert float(spread.square().mean()) == pytest.approx(1 / 3, abs=0.005)
    histogram = torch.histc(spread, 20, -1, 1) / spread.numel()
    torch.testing.assert_close(histogram, torch.full_like(histogram, 0.05), rtol=0.05, atol=0)
    together = torch.corrcoef(spread[:, :9].t()) - torch.eye(9, dtype=torch.float64)
    assert float(together.abs().max()) < 0.1  # features of one hash, and of the next
    alike = torch.corrcoef(spread[:9]) - torch.eye(9, dtype=torch.float64)
    assert float(alike.abs().max()) < 0.5  # tokens that are neighbours


def test_the_noise_of_a_token_does_not_depend_on_its_neighbours() -> None:
    whole = Jitter.of(0.1, 5, range(12)).of_layer(2).factors(7, torch.float32)
    parts = [
        Jitter.of(0.1, 5, part).of_layer(2).factors(7, torch.float32)
        for part in (range(5), range(5, 6), range(6, 12))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_steps_layers_tokens_and_features_have_noise_of_their_own() -> None:
    seen = [
        Jitter.of(0.1, key, range(8)).of_layer(layer).factors(8, torch.float64)
        for key in (5, 6)
        for layer in (0, 1)
    ]
    values = torch.stack(seen).flatten()
    assert values.unique().numel() > 0.95 * values.numel()


def test_only_the_router_sees_the_noise() -> None:
    """With as many choices as experts and equal router rows, noise moves no weight: the output must not move."""
    layer = SparseMoE(16, MoEConfig(num_experts=4, top_k=4, expert_intermediate_size=8), ExpertLayout(4))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    layer.router.weight.data[:] = layer.router.weight.data[0].clone()
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    (clean, one), (noisy, two) = layer(x), layer(x, None, Jitter.of(0.5, 5, range(6)))
    assert not torch.allclose(one.log_sum_exp_T, two.log_sum_exp_T)
    torch.testing.assert_close(clean, noisy)


def _model(recompute: Any = "none") -> Transformer:
    config = ModelConfig(
        vocab_size=50,
        hidden_size=16,
        num_layers=3,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2),
        moe=MOE,
    )
    model = Transformer(config, recompute=recompute)
    initialize(model, 7)
    return model


def test_recomputation_sees_the_same_noise() -> None:
    """To the bit, though a forward pass with other noise comes between forward and backward."""
    draw = torch.Generator().manual_seed(3)
    ids, labels = torch.randint(50, (2, 2, 12), generator=draw).unbind(0)
    mask = torch.ones_like(ids, dtype=torch.bool)
    found = []
    for recompute, epsilon in (("none", 0.4), ("block", 0.4), ("none", 0.0)):
        model = _model(recompute)
        noise = Jitter.of(epsilon, 5, range(24))
        output = model(ids, labels, mask, noise)
        with torch.no_grad():
            model(ids, labels, mask, Jitter.of(epsilon, 6, range(24)))
        assert isinstance(output, ModelOutput)
        output.cross_entropy.backward()
        found.append([output.records[2].ids_TK, *(p.grad for p in model.parameters() if p.grad is not None)])
    plain, recomputed, clean = found
    assert len(plain) == len(recomputed) > 20
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert not torch.equal(plain[-1], clean[-1])


def test_layers_differ_in_their_noise() -> None:
    """Two equal layers on the same input would route alike if they shared it."""
    model = _model()
    seen: list[torch.Tensor] = []
    for layer in model.layers:
        layer.ffn.router.register_forward_pre_hook(  # type: ignore[union-attr]  # a sparse layer
            lambda _, args: seen.append(args[2].factors(16, torch.float32))
        )
    ids = torch.zeros(1, 5, dtype=torch.int64)
    model(ids, ids, ids == 0, Jitter.of(0.1, 5, range(5)))
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
