"""Learning rates step by step, and which parameters decay."""

import itertools
import subprocess
import sys

import pytest
import torch

from moe.config import AttentionConfig, ModelConfig, MoEConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from moe.model import Transformer
from moe.optim import learning_rate, make, parameter_groups
from moe.optim.adamw import AdamW


def _train(schedule: ScheduleConfig, steps: int = 100, weight_decay: float = 0.1) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        global_batch_size=1,
        micro_batch_size=1,
        optimizer=OptimizerConfig(learning_rate=1.0, weight_decay=weight_decay),
        schedule=schedule,
    )


def test_warm_up_rises_to_the_peak_and_cosine_ends_at_the_final_fraction() -> None:
    train = _train(ScheduleConfig(kind="cosine", warmup_steps=10, final_fraction=0.1))
    rates = [learning_rate(train, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[10 + 44] + rates[10 + 45] == pytest.approx(1.1, abs=1e-6)  # half-way


def test_wsd_holds_the_peak_and_falls_in_a_line() -> None:
    train = _train(ScheduleConfig(kind="wsd", warmup_steps=10, decay_steps=20, final_fraction=0.0))
    rates = [learning_rate(train, step) for step in range(100)]
    assert rates[9:80] == pytest.approx([1.0] * 71)
    assert rates[99] == pytest.approx(0.0)
    assert rates[89] == pytest.approx(0.5)


def test_constant_stays() -> None:
    train = _train(ScheduleConfig(kind="constant", warmup_steps=2))
    assert [learning_rate(train, step) for step in (0, 1, 50, 99)] == pytest.approx([0.5, 1.0, 1.0, 1.0])


def test_matrices_decay_and_vectors_do_not() -> None:
    config = ModelConfig(
        vocab_size=20,
        hidden_size=8,
        num_layers=1,
        attention=AttentionConfig(num_heads=2, qkv_bias=True),
        moe=MoEConfig(num_experts=2, top_k=2, expert_intermediate_size=4, expert_bias=True, latent_size=6),
    )
    model = Transformer(config)
    train = _train(ScheduleConfig(), weight_decay=0.3)
    groups = parameter_groups(model, train.optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in groups[0]["params"]}
    plain = {names[id(p)] for p in groups[1]["params"]}
    assert decayed | plain == set(names.values())
    assert plain == {name for name in names.values() if "norm" in name or name.endswith("bias")}
    assert [group["weight_decay"] for group in make(groups, model, train).param_groups] == [0.3, 0.0]


def test_adamw_steps_to_the_bit_as_torchs_and_keeps_the_same_states() -> None:
    """Ours lacks torch's wrappers around each method, which load its compiler."""
    results = []
    for kind in (torch.optim.AdamW, AdamW):
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(7, 5, generator=generator).requires_grad_()
        optimizer = kind([{"params": [weight], "name": "decayed"}], lr=0.1, weight_decay=0.2, fused=True)
        for rate in (0.1, 0.05):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = rate
            weight.grad = torch.randn(7, 5, generator=generator)
            optimizer.step()
        loaded = kind([{"params": [weight], "name": "decayed"}], fused=True)
        loaded.load_state_dict(optimizer.state_dict())
        weight.grad = torch.ones(7, 5)
        loaded.step()
        results.append([weight.detach(), *loaded.state[weight].values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not results[1][0].requires_grad


def test_a_step_does_not_load_torchs_compiler() -> None:
    program = (
        "import sys, torch; from moe.optim.adamw import AdamW; weight = torch.ones(2, requires_grad=True); "
        "optimizer = AdamW([weight], fused=True); weight.sum().backward(); optimizer.step(); "
        "optimizer.zero_grad(); optimizer.load_state_dict(optimizer.state_dict()); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
