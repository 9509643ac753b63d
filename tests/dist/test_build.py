"""Under ZeRO 3 a model is built in pieces: no rank ever holds more than its share and one layer."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

from moe.config import ModelConfig
from moe.engine.build import build
from moe.hf.native import stored
from tests.dist.layouts import ranks_of, tiny
from tests.harness import run_ranks

LAYERS, HIDDEN, INNER, EXPERTS = 20, 512, 512, 8
LAYER_BYTES = 4 * EXPERTS * 3 * HIDDEN * INNER
M_MMAP_THRESHOLD = -3


class _Flat:
    """Weights of a model that need no room until they are asked for."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self.plan = {tensor.name: tensor for tensor in stored(model)}

    def names(self) -> list[str]:
        return list(self.plan)

    def pieces(self, name: str, only: range | None = None) -> Iterator[torch.Tensor]:
        tensor = self.plan[name]
        for expert in range(len(tensor.keys)) if only is None else only:
            yield torch.full(tensor.piece_shape, float(expert))


def _peak_growth(zero_stage: int, rank: int, world_size: int, ep: int = 1, begins: bool = False) -> int:
    """Bytes of resident memory that building takes at most above what stood before."""
    run = tiny(
        model={
            "hidden_size": HIDDEN,
            "num_layers": LAYERS,
            "moe": {"num_experts": EXPERTS, "top_k": 2, "expert_intermediate_size": INNER},
        },
        train={"micro_batch_size": 2},
        parallel={"zero_stage": zero_stage, "expert_parallel_size": ep},
    )
    ranks = ranks_of(rank, world_size, ep)
    small = tiny(train={"micro_batch_size": 2}, parallel=run.parallel.model_dump())
    build(small, ranks)  # imports, groups
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before = _resident("VmRSS")
    model = build(run, ranks, _Flat(run.model) if begins else None)
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


def test_stage_3_builds_in_pieces(tmp_path: Path) -> None:
    run_ranks(_built, 2, tmp_path)


def _begun(rank: int) -> None:
    torch.set_num_threads(1)
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20) == 1
    halves, pieces = (_peak_growth(stage, rank, 2, ep=2, begins=True) for stage in (1, 3))
    total = LAYERS * LAYER_BYTES
    dense = (
        LAYERS * 4 * 3 * HIDDEN * HIDDEN
    )  # attention: queries and outputs, and half as wide keys and values
    # This rank's experts, what every rank has, and one tensor that is being read.
    assert total * 0.45 < halves - dense < total / 2 + LAYER_BYTES, (
        f"{halves / 2**20:.0f} MiB of {total / 2**20:.0f}"
    )
    assert pieces < total / 2 + 4 * LAYER_BYTES, f"{pieces / 2**20:.0f} MiB of {total / 2**20:.0f}"


def test_a_rank_that_begins_with_a_checkpoint_holds_its_own_experts_alone(tmp_path: Path) -> None:
    run_ranks(_begun, 2, tmp_path)
