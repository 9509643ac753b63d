"""A save beside training on real ranks: what it writes, what it costs, how it fails; and proof after a resize."""

import json
import logging
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe import log
from moe.checkpoint import folder as folders
from moe.checkpoint import save as saves
from moe.checkpoint import state as states
from moe.checkpoint import tensors
from moe.checkpoint.resize import resize
from moe.checkpoint.resume import restore
from moe.checkpoint.save import Saver, TrainState, save
from moe.config import RunConfig
from moe.errors import CheckpointError
from moe.metrics import Tracker
from tests.dist.layouts import ranks_of, start, tiny, train
from tests.harness import run_ranks
from tests.unit.test_checkpoint_files import downgrade

MOE = {
    "num_experts": 8,
    "top_k": 2,
    "expert_intermediate_size": 24,
    "router_score": "sigmoid",
    "selection_bias": True,
}


def _run(folder: Path, ep: int = 2, zero: int = 1, **sections: Any) -> RunConfig:
    return tiny(
        run_dir=str(folder),
        parallel={"expert_parallel_size": ep, "zero_stage": zero},
        model={"moe": MOE},
        balance={"bias_update_rate": 0.01},
        **sections,
    )


def _hashes(run: RunConfig, step: int) -> dict[str, str | None]:
    folder = folders.step_folder(run.folder, step)
    manifest = folders.read_manifest(folder)
    folders.verify(folder, manifest)
    assert tensors.verify(folder, manifest) == len(manifest.tensors)
    return {key: saved.xxh3 for key, saved in manifest.tensors.items()}


def _beside_training(rank: int, folder: Path) -> None:
    """Saves of steps 1 and 3 go on while steps 2, 3 and 4 are taken; what they hold is what step 1 and 3 left."""
    ranks = ranks_of(rank, 2, 2)
    run, waiting = _run(folder / "beside"), _run(folder / "waiting", checkpoint={"asynchronous": False})
    gate, real = threading.Event(), tensors.write

    def slow(*arguments: Any) -> Any:
        if threading.current_thread().name == "checkpoint":
            assert gate.wait(60)
        return real(*arguments)

    tensors.write = slow
    engine = start(run, ranks)
    target = folders.step_folder(run.folder, 1)
    with Saver.open(engine, "data", 0) as saver:
        train(engine, 0, 1)
        saver.save(TrainState(1, 10))
        train(engine, 1, 3)
        assert not target.exists()
        assert not saver.poll()
        threading.Timer(0.3, gate.set).start()
        saver.save(TrainState(3, 30))  # waits for the first
        assert target.exists()
        train(engine, 3, 4)
        saver.finish(TrainState(4, 40))
    engine.wrapped.destroy()
    tensors.write = real

    engine = start(waiting, ranks)
    with Saver.open(engine, "data", 0) as saver:
        for step in (1, 2, 3, 4):
            train(engine, step - 1, step)
            if step in (1, 3):
                saver.save(TrainState(step, 10 * step))
                assert folders.step_folder(waiting.folder, step).exists()
        saver.finish(TrainState(4, 40))
        saver.finish(TrainState(4, 40))
    engine.wrapped.destroy()


def test_what_a_thread_writes_is_the_state_at_the_step_and_training_goes_on(tmp_path: Path) -> None:
    run_ranks(_beside_training, 2, tmp_path, tmp_path)
    beside, waiting = _run(tmp_path / "beside"), _run(tmp_path / "waiting")
    assert folders.steps(beside.folder) == folders.steps(waiting.folder) == [1, 3, 4]
    for step in (1, 3, 4):
        assert _hashes(beside, step) == _hashes(waiting, step)
    assert _hashes(beside, 1) != _hashes(beside, 3)


def _second_fails(rank: int, folder: Path) -> None:
    ranks, run = ranks_of(rank, 2, 2), _run(folder)
    engine, real = start(run, ranks), tensors.write

    def full(path: Path, *rest: Any) -> Any:
        if "step_2" in str(path) and rank == 1:
            raise OSError(28, "No space left on device")
        return real(path, *rest)

    tensors.write = full
    with Saver.open(engine, "data", 0) as saver:
        train(engine, 0, 1)
        saver.save(TrainState(1, 10))
        train(engine, 1, 2)
        saver.save(TrainState(2, 20))
        steps, deadline = 2, time.monotonic() + 100
        while not ranks.any(saver.poll()):
            train(engine, steps, steps + 1)
            steps += 1
            assert time.monotonic() < deadline
        with pytest.raises(
            CheckpointError, match=r"^rank 1 could not write to .*step_2: No space left on device"
        ):
            saver.finish(TrainState(steps, 10 * steps))
    with pytest.raises(ZeroDivisionError), Saver.open(engine, "data", 1) as saver:  # noqa: PT012
        saver.save(TrainState(3, 30))
        raise ZeroDivisionError  # training fails elsewhere, while that is written
    tensors.write = real
    assert folders.steps(folder) == [1, 3]
    ranks.barrier()
    if rank == 0:
        shutil.rmtree(folders.step_folder(folder, 3))
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_1"]
    ranks.barrier()
    engine.wrapped.destroy()
    engine = start(run, ranks)
    assert restore(engine, "data").step == 1


def test_a_failure_in_a_thread_reaches_all_ranks_and_spares_what_was_saved(tmp_path: Path) -> None:
    run_ranks(_second_fails, 2, tmp_path, tmp_path / "run")
    assert _hashes(_run(tmp_path / "run"), 1)


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.sentences: list[str] = []
        log.get().addHandler(self)
        log.get().setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.sentences.append(record.getMessage())


def _resized(rank: int, folder: Path) -> None:
    ranks, run = ranks_of(rank, 2, 2), _run(folder)
    engine = start(run, ranks)
    train(engine, 0, 2)
    save(engine, TrainState(2, 20), "data")
    engine.wrapped.destroy()

    said = _Said()
    same = start(run, ranks)
    restore(same, "data")
    same.wrapped.destroy()
    assert said.sentences == []

    alone = ranks_of(rank, 2, 1)
    for zero in (0, 2):
        engine = start(_run(folder, 1, zero), alone)
        restore(engine, "data")
        engine.wrapped.destroy()
        count = len(folders.read_manifest(folders.step_folder(run.folder, 2)).tensors)
        sentence = (
            f"resized from 2 ranks x EP 2 x ZeRO 1, micro-batch 2 to 2 ranks x EP 1 x ZeRO {zero}, micro-batch 2: "
            f"{count} tensors equal by hash"
        )
        assert said.sentences == ([sentence] if rank == 0 else [])
        said.sentences.clear()

    if rank == 0:
        shutil.copytree(folder / "checkpoints", folder / "saved/checkpoints")
        shutil.copytree(folder / "checkpoints", folder / "older/checkpoints")
        downgrade(folder / "older/checkpoints/step_2")
    ranks.barrier()
    engine = start(_run(folder / "older", 1), alone)
    assert restore(engine, "data") == TrainState(2, 20)
    engine.wrapped.destroy()
    if rank == 0:
        (sentence,) = said.sentences
        assert "step 2 was written by version 1 of the format, without hashes of tensors" in sentence
        said.sentences.clear()
    engine = start(_run(folder / "saved", 1, 2), alone)
    state = restore(engine, "data")
    if rank == 0:
        shutil.rmtree(folder / "saved/checkpoints")
    ranks.barrier()
    save(engine, state, "data")
    engine.wrapped.destroy()

    real = states.write

    def wrong(engine: Any, parameter: Any, state: str, value: torch.Tensor) -> None:
        if value.ndim == 3 and state == "exp_avg_sq":  # experts 3 and 4 change places
            value = value[[0, 1, 2, 4, 3, 5, 6, 7]]
        real(engine, parameter, state, value)

    states.write = wrong
    engine = start(_run(folder, 1, 1), alone)
    with pytest.raises(CheckpointError, match=r"tensors are not what they were, exp_avg_sq/.*\[3\] first"):
        restore(engine, "data")
    states.write = real


def test_a_resize_is_proved_by_hash_or_refused_with_the_first_tensor(tmp_path: Path) -> None:
    run_ranks(_resized, 2, tmp_path, tmp_path)

    # What is resized without an engine is, to the byte, what the ranks of the other layout would have saved.
    result = resize(tmp_path, {"ep": 1, "zero": 2}, output=tmp_path / "offline")
    saved = folders.read_manifest(tmp_path / "saved/checkpoints/step_2")
    offline = folders.read_manifest(result.folder)
    assert offline.layout == saved.layout
    assert offline.tensors == saved.tensors
    for name in ("state-00000.safetensors", "state-00001.safetensors"):
        assert offline.files[name] == saved.files[name]


def _held(rank: int, folder: Path) -> None:
    run = _run(folder, 1)
    engine, real = start(run, ranks_of(rank, 1, 1)), tensors.write
    goes_on, now, take = threading.Event(), [0.0], saves.HostCopies.take

    def slow(*arguments: Any) -> Any:
        assert goes_on.wait(60)
        now[0] += 0.3
        return real(*arguments)

    def copied(*arguments: Any) -> Any:
        now[0] += 0.2
        return take(*arguments)

    tensors.write, saves.HostCopies.take = slow, copied  # type: ignore[method-assign]  # this process ends with the test
    saves.time = SimpleNamespace(perf_counter=lambda: now[0])  # type: ignore[assignment]  # the machine's speed is no part of it
    said = _Said()
    folder.mkdir(exist_ok=True)
    with Tracker.open(run, speaks=True, step=0) as tracker, Saver.open(engine, "data", 0, tracker) as saver:
        train(engine, 0, 1)
        saver.save(TrainState(1, 10))
        goes_on.set()
        deadline = time.monotonic() + 100
        while not said.sentences:
            assert not saver.poll()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    (sentence,) = said.sentences
    assert sentence.startswith("saved step 1: ")
    assert "MB; training was held for " in sentence


def test_a_save_says_how_long_it_held_training(tmp_path: Path) -> None:
    run_ranks(_held, 1, tmp_path, tmp_path / "run")
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["step"] == 1
    assert record["checkpoint_held_seconds"] == pytest.approx(0.2)
    assert record["checkpoint_write_seconds"] == pytest.approx(2 * 0.3)  # two files
    assert record["checkpoint_bytes"] > 100_000
