"""A skipped step leaves no trace, in any layout; too many lead back to the last good checkpoint; all is told."""

import json
import logging
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe import log
from moe.advance import advance
from moe.checkpoint import folder as folders
from moe.checkpoint import state as states
from moe.checkpoint.resume import restore
from moe.checkpoint.save import TrainState, save
from moe.config import RunConfig
from moe.engine.engine import Engine
from moe.engine.result import StepResult
from moe.errors import TrainingError
from moe.metrics import Meter, Tracker
from tests.dist.layouts import OPTIMIZER, batches, ranks_of, start, tiny
from tests.harness import run_ranks

PAIRS = [(0, "fp32", "adamw"), (0, "fp32", "muon")]
PAIRS += [(zero, p, o) for zero in (1, 2) for p in ("fp32", "bf16") for o in ("adamw", "muon")]
PAIRS += [(3, "fp32", "adamw"), (3, "bf16", "adamw")]
LAYOUTS = {1: [(0, "fp32", "muon"), (1, "bf16", "adamw")], 2: PAIRS}
WATCHED = {"non_finite": "skip", "sigma_factor": 50.0, "rolling_interval_length": 4}
ROLLS_BACK = {"non_finite": "skip", "max_in_a_row": 2, "then": "roll_back"}
MOE = {"num_experts": 8, "top_k": 2, "expert_intermediate_size": 24, "selection_bias": True}
FAULTS = {
    1: ("a gradient that is no number", "its gradient is not finite"),
    4: ("an infinite loss", "its loss is inf"),
    6: (
        "a huge gradient",
        "its gradient norm of .* more than 50 standard deviations of .* the last 4 steps taken",
    ),
    7: (
        "a huge loss",
        "its loss of .* is more than 50 standard deviations of .* the mean of the last 4 steps taken",
    ),
}
"""Step (from 0) -> what is planted in it, and what is said of it. Step 1 comes before any moment but the first."""
END = 9


def _run(layout: tuple[int, str, str], ep: int, guard: dict[str, Any], **sections: Any) -> RunConfig:
    zero, precision, optimizer = layout
    return tiny(
        parallel={"expert_parallel_size": ep, "zero_stage": zero},
        train={
            "precision": precision,
            "micro_batch_size": 2,
            "optimizer": {**OPTIMIZER, "kind": optimizer},
            "guard": guard,
        },
        model={"moe": MOE},
        balance={"bias_update_rate": 0.01},
        logging={"peak_tflops": 1.0},
        **sections,
    )


@contextmanager
def _planted(engine: Engine, fault: str) -> Iterator[None]:
    """Spoil the first micro-batch of the last rank alone."""
    if engine.ranks.rank != engine.ranks.world_size - 1:
        yield
        return
    spoilt, losses = False, engine._losses

    def once(value: Any, changed: Any) -> Any:
        nonlocal spoilt
        spoilt, before = True, spoilt
        return value if before else changed

    def spoil_loss(*arguments: Any) -> Any:
        here = losses(*arguments)
        added = math.inf if fault == "an infinite loss" else 1e5
        return once(here, replace(here, cross_entropy=here.cross_entropy + added))

    hooks = []
    if "gradient" in fault:
        factor = 1e6 if fault == "a huge gradient" else math.nan
        expert = next(p for name, p in engine.model.named_parameters() if "experts" in name)
        hooks.append(expert.register_hook(lambda gradient: once(gradient, gradient * factor)))
    else:
        engine._losses = spoil_loss  # type: ignore[method-assign]
    yield
    engine._losses = losses  # type: ignore[method-assign]
    for hook in hooks:
        hook.remove()
    assert spoilt


def _step(engine: Engine, state: TrainState, faults: dict[int, str]) -> StepResult:
    here = batches(engine.run, engine.ranks, state.step)
    if state.step not in faults:
        return engine.step(here, state.step, guard=state.guard)
    with _planted(engine, faults[state.step]):
        return engine.step(here, state.step, guard=state.guard)


def _all(engine: Engine) -> dict[str, Tensor]:
    """Every tensor that a step may change, this rank's part: masters, moments, counts, the model's own, biases."""
    base = getattr(engine.wrapped.optimizer, "optimizer", engine.wrapped.optimizer)
    found = dict(states.collect(engine))
    found |= {f"model/{name}": tensor.detach().clone() for name, tensor in engine.model.state_dict().items()}
    for index, state in enumerate(base.state.values()):
        found |= {f"optimizer/{index}/{name}": tensor.clone() for name, tensor in state.items()}
    return found


def _differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


def _left_out(rank: int, world_size: int, folder: Path) -> None:
    for layout in LAYOUTS[world_size]:
        ranks = ranks_of(rank, world_size, world_size)
        engine = start(_run(layout, world_size, WATCHED, run_dir=str(folder / str(layout))), ranks)
        state, results = TrainState(), []
        while state.step < END:
            before = _all(engine) if state.step else {}
            planted, said = FAULTS.get(state.step, ("", ""))
            result = _step(engine, state, {state.step: planted} if planted else {})
            what = f"{layout}, step {state.step}, {planted}: {result.fault}"
            assert re.fullmatch(said, result.fault), what
            if planted:
                assert _differ(before, _all(engine)) == [], what
                state = state.passed_over(result.guard)
            else:
                results.append(float(result.total))
                assert _differ(before, _all(engine)) if before else True
                state = state.after(result.num_tokens, result.tokens_per_expert, result.guard)
        guarded = _all(engine)
        engine.wrapped.destroy()
        assert (state.guard.skipped, state.updates, state.tokens) == (4, 5, 5 * 8 * 32)

        plain = start(_run(layout, world_size, {}), ranks)
        never_seen = [step for step in range(END) if step not in FAULTS]
        assert results == [float(plain.step(batches(plain.run, ranks, s), s).total) for s in never_seen], (
            layout
        )
        assert _differ(guarded, _all(plain)) == [], layout
        assert {float(t) for key, t in guarded.items() if key.endswith("/step")} == {5.0}
        plain.wrapped.destroy()


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_training_after_a_skipped_step_is_training_that_never_saw_it(world_size: int, tmp_path: Path) -> None:
    run_ranks(_left_out, world_size, tmp_path, world_size, tmp_path, timeout_s=500)


ON_RECORD = [1, 2, 3, 4, 8, 9]
"""Steps (from 1) with a training record, when steps 6 and 7 are bad and checkpoint step_4 is the last good one."""


def _guarded_run(folder: Path, **guard: Any) -> RunConfig:
    return _run(
        (1, "bf16", "adamw"), 2, {**ROLLS_BACK, **guard}, run_dir=str(folder), checkpoint={"every_steps": 2}
    )


def _go(run: RunConfig, rank: int, until: int, bad: set[int]) -> tuple[TrainState, dict[str, Tensor]]:
    """Train as `moe.train` does, on from the newest checkpoint; steps (from 1) in `bad` have no finite gradient."""
    ranks = ranks_of(rank, 2, 2)
    engine = start(run, ranks)
    state = restore(engine, "data")
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with Tracker.open(run, speaks=rank == 0, step=state.step) as tracker:
            meter = Meter(run, ranks, tracker)
            while state.step < until:
                faults = dict.fromkeys([step - 1 for step in bad], "a gradient that is no number")
                state = advance(engine, state, _step(engine, state, faults), meter)
                if state.step % 2 == 0:
                    save(engine, state, "data")
        return state, _all(engine)
    finally:
        engine.wrapped.destroy()


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Sentences of the log."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ear = Ear()
    log.get().addHandler(ear)
    yield said
    log.get().removeHandler(ear)


def _straight(folder: Path, rank: int) -> dict[str, Tensor]:
    """Steps 1 to 4, 8 and 9, without a guard."""
    run, ranks = _run((1, "bf16", "adamw"), 2, {}), ranks_of(rank, 2, 2)
    plain = start(run, ranks)
    for step in ON_RECORD:
        plain.step(batches(run, ranks, step - 1), step - 1)
    found = _all(plain)
    plain.wrapped.destroy()
    return found


def _rolled_back(rank: int, folder: Path) -> None:
    whole, straight = folder / "whole", _straight(folder, rank)
    with _heard() as said:
        state, rolled_back = _go(_guarded_run(whole), rank, END, {6, 7})
    assert _differ(rolled_back, straight) == []
    assert (state.step, state.updates, state.tokens) == (9, 6, 6 * 8 * 32)
    assert (state.guard.skipped, state.guard.in_a_row, state.guard.roll_backs) == (3, 0, 1)
    if rank == 0:
        assert [sentence for sentence in said if "skipped" in sentence] == [
            "step 6 is skipped: its gradient is not finite; 1 in a row, 1 in all",
            "step 7 is skipped: its gradient is not finite; 2 in a row, 2 in all",
            "step 7: rolled back to checkpoint step_4 (roll-back 1); on with the batches of step 8, 3 steps skipped "
            "in all",
        ]
        records = _records(whole)
        assert [r["step"] for r in records if "loss" in r] == ON_RECORD
        assert [r["skipped_steps"] for r in records if "loss" in r] == [0, 0, 0, 0, 3, 3]
        skips = [(r["step"], r["skipped_in_a_row"], r["skipped_steps"]) for r in records if "skipped" in r]
        assert skips == [(6, 1, 1), (7, 2, 2)]
        assert all(
            math.isfinite(r["skipped_loss"]) and "skipped_grad_norm" not in r
            for r in records
            if "skipped" in r
        )
        back = {"step": 7, "rolled_back_to": 4, "skipped_steps": 3, "roll_backs": 1}
        assert records[-3] == back
    dist.barrier()

    for name, newest, bad in (("after", 8, set()), ("amid", 6, {7})):
        here = folder / name
        if rank == 0:
            _copy(whole, here, newest)
        dist.barrier()
        again, resumed = _go(_guarded_run(here), rank, END, bad)
        assert (again, _differ(resumed, straight)) == (state, []), f"killed at {newest}, {name} the roll-back"
        if rank == 0:
            assert [_told(r) for r in _records(here)] == [_told(r) for r in records], name


def _copy(whole: Path, here: Path, newest: int) -> None:
    """The run as it was when it was killed after the checkpoint `newest`."""
    shutil.copytree(whole, here)
    for step in folders.steps(here):
        if step > newest:
            shutil.rmtree(folders.step_folder(here, step))


def _told(record: dict[str, Any]) -> dict[str, Any]:
    """A record without its times."""
    return {key: v for key, v in record.items() if key not in ("seconds", "tokens_per_second", "mfu")}


def test_a_roll_back_leaves_out_what_came_since_the_last_good_checkpoint_killed_and_resumed_or_not(
    tmp_path: Path,
) -> None:
    run_ranks(_rolled_back, 2, tmp_path, tmp_path)


def _ended(rank: int, folder: Path) -> None:
    bad = set(range(3, END + 1))
    endings = {
        "stop": (
            {"then": "stop"},
            bad,
            r"2 steps in a row were skipped, the last, step 4, because its gradient is",
        ),
        "often": ({"max_roll_backs": 1}, bad, r"step 6, .*as often as train.guard.max_roll_backs, 1, allows"),
        "early": ({}, {1, 2}, r"step 2, .*no checkpoint yet to roll back to: checkpoint.every_steps is 2"),
        "at once": (
            {"non_finite": "stop", "sigma_factor": 50.0, "rolling_interval_length": 4},
            bad,
            "gradient of step 3",
        ),
        "unguarded": (None, bad, r"gradient of step 3 is not finite.*train.guard.non_finite=skip"),
    }
    for name, (guard, faults, words) in endings.items():
        here = folder / name
        run = _guarded_run(here, **guard) if guard is not None else _unguarded(here)
        with pytest.raises(TrainingError, match=words):
            _go(run, rank, END, faults)
        if rank == 0:
            assert re.search(words, _records(here)[-1]["stopped"])
        dist.barrier()
    # What ended one way may go on another: a guard is no part of what is trained.
    state, _ = _go(_guarded_run(folder / "unguarded", max_in_a_row=9), rank, 6, bad)
    assert (state.step, state.guard.skipped, state.guard.in_a_row) == (6, 4, 4)
    state, _ = _go(_unguarded(folder / "unguarded"), rank, 8, set())
    assert (state.updates, state.guard.skipped, state.guard.in_a_row) == (4, 4, 0)


def _unguarded(folder: Path) -> RunConfig:
    return _run((1, "bf16", "adamw"), 2, {}, run_dir=str(folder), checkpoint={"every_steps": 2})


def test_a_run_that_cannot_go_on_says_why_and_on_record(tmp_path: Path) -> None:
    run_ranks(_ended, 2, tmp_path, tmp_path)


def _saved_amid(rank: int, folder: Path) -> None:
    # From the first step on, before there are moments; and again after they exist.
    for name, bad in (("first", {1, 2}), ("later", {3, 4})):
        run = _run(
            (2, "fp32", "adamw"), 2, WATCHED, run_dir=str(folder / name), checkpoint={"every_steps": 2}
        )
        straight, whole = _go(run, rank, 6, bad)
        for step in (4, 6):
            if rank == 0:
                shutil.rmtree(folders.step_folder(run.folder, step))
        dist.barrier()
        state, resumed = _go(run, rank, 6, bad)
        assert len(state.guard.losses) == 4, "of them two from before, or none"
        assert (state, _differ(resumed, whole)) == (straight, []), name
    keeps = {"every_steps": 2, "keep": 1}
    guard = ROLLS_BACK | {"max_in_a_row": 9}
    kept = _run((1, "fp32", "adamw"), 2, guard, run_dir=str(folder / "kept"), checkpoint=keeps)
    _go(kept, rank, 6, {5, 6})
    assert folders.steps(kept.folder) == [4, 6]
    _go(kept, rank, 8, set())
    assert folders.steps(kept.folder) == [8]


def test_a_save_amid_skipped_steps_resumes_and_keeps_what_a_roll_back_needs(tmp_path: Path) -> None:
    run_ranks(_saved_amid, 2, tmp_path, tmp_path)
