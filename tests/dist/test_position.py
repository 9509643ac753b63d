"""The training loop itself, cut and gone on with on other ranks: each sample once an epoch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.checkpoint import folder as folders
from moe.config import RunConfig
from moe.data.loader import Batch
from moe.data.shards import TokenData
from moe.engine.engine import Engine
from moe.engine.result import StepResult
from moe.stop import StopSignal
from moe.train import train
from tests.dist.layouts import ranks_of, tiny
from tests.harness import run_ranks
from tests.stock import write_tokenizer
from tests.unit.corpus import raw_data

LENGTH, SAMPLES, BATCH = 4, 23, 8
STRETCHES = [(3, 2, 2, 2), (8, 1, 1, 8), (12, 2, 1, 1)]
"""Up to which step, on how many ranks, with which expert parallelism and micro-batch. 12 steps: 4 epochs and a bit."""


def _run(folder: Path, steps: int, ep: int, micro: int) -> RunConfig:
    return tiny(
        run_dir=str(folder / "run"),
        data={"path": str(folder / "data"), "sequence_length": LENGTH},
        parallel={"expert_parallel_size": ep},
        train={"steps": steps, "micro_batch_size": micro},
    )


def _stretch(rank: int, world_size: int, run: RunConfig, seen: Path) -> None:
    step = Engine.step

    def noted(self: Engine, batches: Sequence[Batch], number: int, **more: Any) -> StepResult:
        rows = [row for batch in batches for row in batch.input_ids_BS.tolist()]
        with (seen / f"{number:03d}-{rank}").open("x") as file:  # no step is taken twice
            json.dump([row[0] // LENGTH for row in rows], file)
        return step(self, batches, number, **more)

    Engine.step = noted  # type: ignore[method-assign]  # this process ends with the test
    data = TokenData.open(Path(run.data.path), verify=False)
    assert train(run, data, ranks_of(rank, world_size, run.parallel.expert_parallel_size), StopSignal()) == 0


def test_each_sample_comes_once_an_epoch_on_whatever_ranks(tmp_path: Path) -> None:
    raw_data(tmp_path / "data", {"train": [list(range(SAMPLES * LENGTH + 1))]}, vocab_size=100)
    write_tokenizer(tmp_path / "data/tokenizer")
    (tmp_path / "seen").mkdir()
    for until, world_size, ep, micro in STRETCHES:
        run = _run(tmp_path, until, ep, micro)
        run_ranks(_stretch, world_size, tmp_path, world_size, run, tmp_path / "seen")
        manifest = folders.read_manifest(folders.step_folder(run.folder, until))
        assert manifest.next_sample == until * BATCH
    seen = [
        sample for path in sorted((tmp_path / "seen").iterdir()) for sample in json.loads(path.read_text())
    ]
    assert len(seen) == 12 * BATCH
    epochs = [seen[at : at + SAMPLES] for at in range(0, len(seen), SAMPLES)]
    assert [sorted(epoch) for epoch in epochs[:-1]] == [list(range(SAMPLES))] * 4
    assert len(set(map(tuple, epochs))) == 5
    assert len(set(epochs[-1])) == len(epochs[-1]) == 4
