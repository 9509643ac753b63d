"""Under ZeRO 3 a model is built in pieces: no rank ever holds more than its share and one layer."""

import ctypes
from pathlib import Path

import pytest
import torch

from moe.engine.build import build
from tests.dist.layouts import ranks_of, tiny
from tests.harness import run_ranks

LAYERS, HIDDEN, INNER, EXPERTS = 20, 512, 512, 8
LAYER_BYTES = 4 * EXPERTS * 3 * HIDDEN * INNER
M_MMAP_THRESHOLD = -3


def _peak_growth(zero_stage: int, rank: int, world_size: int) -> int:
    """Bytes of resident memory that building takes at most above what stood before."""
    run = tiny(
        model={
            "hidden_size": HIDDEN,
            "num_layers": LAYERS,
            "moe": {"num_experts": EXPERTS, "top_k": 2, "expert_intermediate_size": INNER},
        },
        train={"micro_batch_size": 2},
        parallel={"zero_stage": zero_stage},
    )
    ranks = ranks_of(rank, world_size, 1)
    build(tiny(train={"micro_batch_size": 2}, parallel={"zero_stage": zero_stage}), ranks)  # imports, groups
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before = _resident("VmRSS")
    model = build(run, ranks)
    grown = _resident("VmHWM") - before
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    del model
    return grown


def _resident(which: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) << 10


def _built(rank: int) -> None:
    torch.set_num_threads(1)
    # What is freed goes back at once: what is held is to be measured, not glibc's fragments.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20) == 1
    whole, pieces = (_peak_growth(stage, rank, 2) for stage in (1, 3))
    total = LAYERS * LAYER_BYTES
    assert whole > 0.9 * total, "the measure sees what it should"
    # The share, a layer, and what cutting it up takes, whatever the number of layers.
    assert pieces < total / 2 + 4 * LAYER_BYTES, f"{pieces / 2**20:.0f} MiB of {total / 2**20:.0f}"


@pytest.mark.timeout(200)
def test_stage_3_builds_in_pieces(tmp_path: Path) -> None:
    run_ranks(_built, 2, tmp_path, timeout_s=150)
