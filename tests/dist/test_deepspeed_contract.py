"""What we rely on in DeepSpeed, and the defects we work around: an upgrade that changes either fails here."""

import inspect
from pathlib import Path

import pytest
import torch

from moe.engine import ds_config, groups
from moe.engine.clip import clip_gradients
from moe.engine.library import deepspeed
from moe.errors import ConfigError
from moe.sparse import SparseMoE
from tests.dist.layouts import batches, curve, ranks_of, start, tiny, train
from tests.harness import run_ranks


def _plain_layers_are_wrong_or_refused(rank: int) -> None:
    """Without the adapter's base class, expert parallelism under ZeRO 1 does not run."""
    run = tiny(parallel={"expert_parallel_size": 2, "zero_stage": 1}, train={"micro_batch_size": 2})
    ranks = ranks_of(rank, 2, 2)
    adopted = curve(train(start(run, ranks), 0, 4))

    def mark_only(layer: SparseMoE) -> None:
        for parameter in layer.experts.parameters():
            parameter.allreduce, parameter.group_name = False, "ep_size_2"  # type: ignore[attr-defined]

    original, groups._adopt = groups._adopt, mark_only
    try:
        with pytest.raises((TypeError, KeyError)):
            train(start(run, ranks), 0, 1)
        groups._adopt = lambda _: None
        unmarked = curve(train(start(run, ranks), 0, 4))
    finally:
        groups._adopt = original
    # Without marks either it runs, with a healthy-looking loss and other numbers: what silence looks like.
    assert unmarked.gradient_norm != pytest.approx(adopted.gradient_norm, rel=1e-4)


def test_a_plain_layer_crashes_or_trains_silently_wrong(tmp_path: Path) -> None:
    run_ranks(_plain_layers_are_wrong_or_refused, 2, tmp_path)


def _norms_under_stage_0(rank: int) -> None:
    """DeepSpeed averages local norms under ZeRO 0 with expert parallelism (DeepSpeed#8475); ours counts each once."""
    ranks = ranks_of(rank, 2, 2)
    layout = {"train": {"micro_batch_size": 4}, "parallel": {"expert_parallel_size": 2, "zero_stage": 1}}
    expected = float(train(start(tiny(**layout), ranks), 0, 1)[0].gradient_norm)
    layout["parallel"]["zero_stage"] = 0
    run = tiny(**layout)
    engine = start(run, ranks)
    engine.wrapped.train()
    (batch,) = batches(run, ranks, 0)
    output = engine.wrapped(batch.input_ids_BS, batch.labels_BS, batch.mask_BS)
    engine.wrapped.backward(engine._losses(output, batch, engine._totals([batch], [None])).total * 2)
    grads = [p.grad.double() for p in engine.model.parameters() if p.grad is not None]
    local = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    assert float(ranks.sum(local.clone()) / 2) != pytest.approx(expected, rel=1e-6)
    assert float(clip_gradients(engine.model, ranks, 0.0)) == pytest.approx(expected, rel=1e-6)


def test_our_stage_0_norm_is_not_the_average_of_local_norms(tmp_path: Path) -> None:
    run_ranks(_norms_under_stage_0, 2, tmp_path)


def test_deepspeed_still_averages_local_norms_under_stage_0() -> None:
    """When this fails, upstream has mended it: moe/engine/clip.py can go."""
    source = inspect.getsource(deepspeed.runtime.engine.DeepSpeedEngine.clip_fp32_gradients)
    assert "clip_grad_norm_(parameters=self.module.parameters()" in source


def _homes(rank: int) -> None:
    """Each parameter is where moe.engine.partition says, in any order that DeepSpeed packs them."""
    ranks = ranks_of(rank, 4, 2)
    misplaced = {}
    for zero, round_robin in ((1, False), (2, True)):
        run = tiny(
            train={"micro_batch_size": 2},
            parallel={"expert_parallel_size": 2, "zero_stage": zero},
            deepspeed={"zero_optimization": {"round_robin_gradients": round_robin}},
        )
        engine = start(run, ranks)
        train(engine, 0, 1)
        here = 0
        for parameter, home in engine.homes.items():
            kept = home.tensor.detach()[home.here]
            assert torch.equal(kept, parameter.detach().flatten()[home.inside])
            here += kept.numel()
        padding = sum(engine.wrapped.optimizer.groups_padding)
        assert here + padding == sum(
            t.numel() for t in engine.wrapped.optimizer.single_partition_of_fp32_groups
        )
        misplaced[round_robin] = [
            not torch.equal(p.get_full_hp_param(), p.detach())  # type: ignore[attr-defined]  # DeepSpeed adds it
            for p in engine.model.parameters()
        ]
        engine.wrapped.destroy()
    assert not any(misplaced[False])
    assert any(misplaced[True]), "DeepSpeed has mended its map: moe.engine.partition may use it"


def test_parameters_are_at_home_where_deepspeed_s_own_map_is_wrong(tmp_path: Path) -> None:
    run_ranks(_homes, 4, tmp_path)


BAD_VALUES: list[tuple[str, object]] = [
    ("zero_optimization.reduce_bucket_size", "abc"),
    ("zero_optimization.reduce_bucket_size", -5),
    ("zero_optimization.reduce_bucket_size", 0),
    ("zero_optimization.reduce_bucket_size", 1.5),
    ("zero_optimization.reduce_bucket_size", True),
    ("zero_optimization.reduce_bucket_size", 10**20),
    ("zero_optimization.allgather_bucket_size", 5),
    ("zero_optimization.overlap_comm", None),
    ("communication_data_type", "foo"),
    ("communication_data_type", 16),
    ("memory_breakdown", "yes"),
    ("zero_optimization.round_robin_gradients", [1]),
    ("comms_logger.enabled", 3),
    ("comms_logger.prof_ops", "all_reduce"),
]


def _nested(path: str, value: object) -> dict[str, object]:
    outer, _, inner = path.partition(".")
    return {outer: {inner: value}} if inner else {outer: value}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        *((_nested(path, value), f"deepspeed.{path} is .*: it must be") for path, value in BAD_VALUES),
        (
            {"zero_optimization": {"reduce_scatter": False}},
            "reduce_scatter cannot be set: DeepSpeed needs it",
        ),
        ({"zero_optimization": {"contiguous_gradients": [1]}}, "contiguous_gradients cannot be set"),
        ({"wall_clock_breakdown": True}, "wall_clock_breakdown cannot be set"),
        ({"flops_profiler": {"enabled": "maybe"}}, "flops_profiler cannot be set"),
        ({"prescale_gradients": True}, "prescale_gradients cannot be set"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor cannot be set"),
        ({"zero_optimization": {"stage": 1}, "comms_logger": {"enabled": 3}}, "(?s)zero_stage.*enabled is 3"),
        ({"gradient_cliping": 1.0}, "gradient_cliping: DeepSpeed would ignore it"),
        ({"gradient_clipping": 1.0}, "follows from train.optimizer.gradient_clipping"),
        (
            {"zero_optimization": {"overlap_com": True}},
            "did you mean deepspeed.zero_optimization.overlap_comm",
        ),
        ({"zero_optimization": {"stage": 1}}, "follows from parallel.zero_stage"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "follows from parallel.offload"),
        (
            {"zero_optimization": {"stage3_max_live_parameters": 1}},
            "zero_stage is 1, which does not read it.*use zero_stage 3",
        ),
        ({"zero_optimization": 1}, "must be a block"),
        ({"memory_breakdown": {"on": True}}, "must be a valid boolean"),
    ],
)
def test_raw_keys_are_checked(section: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ds_config.check(section, 1)


def test_raw_keys_reach_deepspeed() -> None:
    run = tiny(deepspeed={"zero_optimization": {"overlap_comm": False}, "memory_breakdown": True})
    made = ds_config.make(run, 4)
    assert made["zero_optimization"] == {"stage": 1, "overlap_comm": False}
    assert made["memory_breakdown"] is True


def test_bucket_sizes_may_be_written_as_deepspeed_s_pages_do() -> None:
    ds_config.check({"zero_optimization": {"reduce_bucket_size": 5e8, "allgather_bucket_size": 2e8}}, 1)


def test_every_key_that_we_pass_through_is_one_that_deepspeed_reads() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    read = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(ds_config.ZeroSection.model_fields) <= read
    assert set(ds_config.ZeroSection.model_fields) == set(ds_config.ONLY_UNDER)
    assert set(ds_config.CommsLoggerSection.model_fields) <= set(CommsLoggerConfig.model_fields)
