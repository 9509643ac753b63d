"""Traps of DeepSpeed that we keep away from, each shown beside what keeps us away: a test that fails here says that
upstream has changed, and that the guard beside it may go.

Those that decide how layers are adopted, norms clipped and partitions found are in test_deepspeed_contract.py.
"""

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe.config import RunConfig
from moe.engine import (
    ds_config,
    library,  # noqa: F401  (DeepSpeed must be imported by it)
)
from moe.errors import ConfigError
from tests.dist.layouts import ranks_of, start, tiny, train
from tests.harness import run_ranks

SELECTED = {
    "num_experts": 8,
    "top_k": 2,
    "expert_intermediate_size": 24,
    "router_score": "sigmoid",
    "selection_bias": True,
}


def _run(ep: int = 2, **sections: Any) -> RunConfig:
    return tiny(parallel={"expert_parallel_size": ep, "zero_stage": 1}, **sections)


def _look(rank: int, folder: Path) -> None:
    """All that needs ranks, in one launch; rank 0 writes down what it saw."""
    seen: dict[str, Any] = {}
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.runtime.config import DeepSpeedConfig

    page = ds_config.make(_run(), 2)
    seen["clip"] = DeepSpeedConfig(
        page | {"gradient_cliping": 0.25, "zero_optimisation": {}}
    ).gradient_clipping

    # No C++ op is compiled: on a busy machine each takes minutes, at the first step.
    compiled: list[str] = []
    original = OpBuilder.jit_load
    OpBuilder.jit_load = lambda self, verbose=True: compiled.append(self.name)  # type: ignore[method-assign]
    engine = start(_run(), ranks_of(rank, 2, 2))
    train(engine, 0, 2)
    OpBuilder.jit_load = original  # type: ignore[method-assign]
    seen["compiled"] = compiled

    # Its export says yes and holds the experts of one rank.
    with warnings.catch_warnings(action="ignore"):
        seen["exported"] = engine.wrapped.save_16bit_model(str(folder), "model.bin")
    dist.barrier()
    found = torch.load(folder / "model.bin", weights_only=True)
    seen["experts"] = [len(tensor) for name, tensor in found.items() if name.endswith("experts.down")]
    with pytest.raises(AttributeError) as refused:
        engine.wrapped.save_checkpoint(str(folder / "theirs"))
    seen["saving"] = str(refused.value)
    engine.wrapped.destroy()

    # The router's bias is a buffer that moves in steps of 1e-3: bf16 would lose them.
    run = _run(train={"precision": "bf16"}, model={"moe": SELECTED}, balance={"bias_update_rate": 0.001})
    engine = start(run, ranks_of(rank, 2, 2))
    train(engine, 0, 2)
    seen["bias"] = [str(bias.dtype) for bias in engine.model.selection_biases()]
    seen["weight"] = str(engine.model.embed.weight.dtype)
    engine.model.bfloat16()
    seen["bias after a cast"] = [str(bias.dtype) for bias in engine.model.selection_biases()]
    engine.wrapped.destroy()

    plain = nn.BatchNorm1d(4).bfloat16()
    seen["another buffer after a cast"] = str(plain.running_mean.dtype)
    if rank == 0:
        (folder / "seen.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("seen")
    run_ranks(_look, 2, folder, folder)
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return found


def test_deepspeed_takes_keys_that_it_does_not_know_and_we_do_not(seen: dict[str, Any]) -> None:
    assert seen["clip"] == _run().train.optimizer.gradient_clipping != 0.25, (
        "it reads them, or refuses them now"
    )
    with pytest.raises(ConfigError, match="gradient_cliping: DeepSpeed would ignore it"):
        ds_config.check({"gradient_cliping": 0.25}, 1)


def test_no_op_is_compiled(seen: dict[str, Any]) -> None:
    assert seen["compiled"] == []


def test_deepspeed_s_own_export_holds_one_rank_s_experts_and_says_yes(seen: dict[str, Any]) -> None:
    """Ours holds all: tests/dist/test_export_trained.py."""
    assert (seen["exported"], seen["experts"]) == (True, [4, 4]), "mended: moe.hf.write may lean on it"


def test_the_selection_bias_stays_float32_in_a_bf16_engine_and_through_a_cast(seen: dict[str, Any]) -> None:
    assert seen["weight"] == "torch.bfloat16"
    assert seen["bias"] == seen["bias after a cast"] == ["torch.float32"] * 2
    assert seen["another buffer after a cast"] == "torch.bfloat16", "casts leave buffers alone now"


def test_deepspeed_s_muon_makes_its_step_before_the_norm_that_clips_it() -> None:
    """Hence our own Muon (moe/optim/muon.py), which gets clipped gradients: tests/dist/test_muon.py."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    reduced = inspect.getsource(DeepSpeedZeroOptimizer.get_flat_partition)
    assert "muon_update(" in reduced, "the gradient is left as it is until the step: read on how"
    step = inspect.getsource(DeepSpeedZeroOptimizer.step)
    assert "self.scaled_global_norm()" in step
    assert "get_flat_partition" not in step


def test_deepspeed_s_own_checkpoints_refuse_our_layers_and_nothing_of_ours_calls_them(
    seen: dict[str, Any],
) -> None:
    """At the same world size it loads another expert parallelism without a word, and scrambles the experts."""
    assert "'w1'" in seen["saving"], "it takes our experts now: think of what it does at another EP"
    rooms = [*Path("moe").rglob("*.py"), *Path("launch").rglob("*.py")]
    assert len(rooms) > 100
    calls = ("wrapped.load_checkpoint", "wrapped.save_checkpoint", "save_16bit_model(", "zero_to_fp32")
    assert not [path for path in rooms for call in calls if call in path.read_text(encoding="utf-8")]


def test_bf16_under_stage_0_leaves_experts_out_of_the_norm() -> None:
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    assert "grads_for_norm, _ = split_params_grads_into_shared_and_expert_params" in inspect.getsource(
        FP16_UnfusedOptimizer.step
    ), "it counts them now: look at its float32 masters, and allow bf16 under stage 0"
    with pytest.raises(ConfigError, match=r"zero_stage is 0 with train\.precision bf16"):
        tiny(parallel={"zero_stage": 0}, train={"precision": "bf16"})
