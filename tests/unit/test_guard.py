"""Which steps a guard finds at fault; that a bad one leaves no mark on what it knows; and what is told of it."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe.checkpoint.folder import Layout, Manifest, Saved
from moe.checkpoint.guarded import read, tensors
from moe.config import GuardConfig, RunConfig
from moe.dist import Ranks
from moe.errors import TrainingError
from moe.guard import Guard
from moe.metrics import Meter, Tracker
from tests.unit.test_meter import _result

WATCHED = GuardConfig(non_finite="skip", sigma_factor=6.0, rolling_interval_length=8)
values = st.floats(-1e6, 1e6)


def _after(config: GuardConfig, losses: list[float], norms: list[float]) -> Guard:
    guard = Guard()
    for loss, norm in zip(losses, norms, strict=True):
        guard = guard.taken(config, loss, norm)
    return guard


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(values, min_size=4, max_size=20), values)
def test_a_spike_is_beyond_the_mean_and_deviation_of_the_latest_steps(
    before: list[float], value: float
) -> None:
    latest = before[-8:]
    limit = statistics.fmean(latest) + 6 * statistics.stdev(latest)
    for guard, loss, norm in (
        (_after(WATCHED, before, [1.0] * len(before)), value, 1.0),
        (_after(WATCHED, [1.0] * len(before), before), 1.0, value),
    ):
        if not math.isclose(value, limit, rel_tol=1e-9, abs_tol=1e-9):
            assert bool(guard.fault(WATCHED, loss, norm)) == (value > limit)


def test_a_fault_is_said_with_its_values() -> None:
    guard = _after(WATCHED, [2.0, 4.0, 2.0, 4.0], [1.0, 1.5, 1.0, 1.5])
    assert guard.fault(WATCHED, 9.0, 1.0) == ""
    assert guard.fault(WATCHED, 10.0, 1.0) == (
        "its loss of 10.0000 is more than 6 standard deviations of 1.1547 above 3.0000, the mean of the last 4 steps "
        "taken"
    )
    assert guard.fault(WATCHED, 3.0, 4.0).startswith("its gradient norm of 4.0000 is more than 6")
    assert guard.fault(WATCHED, math.nan, 1.0) == "its loss is nan"
    assert guard.fault(WATCHED, 3.0, math.inf) == "its gradient is not finite"


def test_half_the_interval_must_be_known_first() -> None:
    known = _after(WATCHED, [1.0, 2.0, 1.0], [1.0] * 3)
    assert known.fault(WATCHED, 1e9, 1.0) == ""
    assert known.taken(WATCHED, 2.0, 1.0).fault(WATCHED, 1e9, 1.0) != ""


def test_without_a_sigma_factor_only_what_is_not_finite_counts() -> None:
    config = GuardConfig(non_finite="skip")
    guard = _after(config, [1.0] * 200, [1.0] * 200)
    assert guard == Guard()
    assert guard.fault(config, 1e30, 1e30) == ""
    assert guard.fault(config, math.inf, 1.0) != ""


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(st.tuples(values, st.booleans()), max_size=40))
def test_skipped_steps_are_counted_and_leave_the_means_alone(steps: list[tuple[float, bool]]) -> None:
    guard, good, skipped, in_a_row = Guard(), [], 0, 0
    config = GuardConfig(non_finite="skip", sigma_factor=6.0, rolling_interval_length=200)
    for value, bad in steps:
        loss = math.nan if bad else value
        guard = guard.after(config, loss, 1.0)
        skipped, in_a_row = skipped + bad, in_a_row + 1 if bad else 0
        good += [] if bad else [value]
    assert (guard.skipped, guard.in_a_row) == (skipped, in_a_row)
    assert list(guard.losses) == good


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(st.tuples(values, values), max_size=9), st.integers(0, 2**40), st.integers(0, 9))
def test_a_checkpoint_holds_a_guard_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, seen: list[tuple[float, float]], skipped: int, others: int
) -> None:
    losses, norms = tuple(loss for loss, _ in seen), tuple(norm for _, norm in seen)
    guard = Guard(losses, norms, skipped, others, others + 1)
    folder = tmp_path_factory.mktemp("guard")
    save_file(tensors(guard), folder / "file")
    written = {key: Saved("file", tuple(tensor.shape), None) for key, tensor in tensors(guard).items()}
    layout = Layout(1, 1, 1, 1)
    assert read(folder, Manifest(1, 1, 1, layout, "data", {}, written)) == guard
    assert read(folder, Manifest(1, 1, 1, layout, "data", {}, {})) == Guard()
    assert tensors(Guard()) == {}


def test_what_happens_is_on_record(tiny_page: dict[str, Any], tmp_path: Path) -> None:
    """A roll-back drops what it undid, but for what was skipped; the error that ends a run comes last."""
    tiny_page["train"]["guard"] = {"non_finite": "skip"}
    run = RunConfig.model_validate(tiny_page | {"run_dir": str(tmp_path), "logging": {"peak_tflops": 1.0}})
    result = _result()
    with pytest.raises(TrainingError), Tracker.open(run, speaks=True, step=0) as tracker:  # noqa: PT012  (it ends so)
        meter = Meter(run, Ranks(), tracker)
        meter.step(result, step=1, tokens=256)
        meter.step(result, step=2, tokens=512)
        meter.skipped(result, "its loss is inf", step=3, in_a_row=1, skipped=1)
        meter.rolled_back(1, step=3, skipped=2, times=1)
        meter.step(result, step=4, tokens=512, skipped=2)
        raise TrainingError("it is over", 5)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 3, 3, 4, 5]
    assert records[1] == {
        "step": 3,
        "skipped": "its loss is inf",
        "skipped_loss": 1.5,
        "skipped_grad_norm": 1.5,
        "skipped_in_a_row": 1,
        "skipped_steps": 1,
    }
    assert records[2] == {"step": 3, "rolled_back_to": 1, "skipped_steps": 2, "roll_backs": 1}
    assert (records[0]["skipped_steps"], records[3]["skipped_steps"]) == (0, 2)
    assert records[4] == {"step": 5, "stopped": "it is over"}


def test_values_that_are_no_numbers_stay_out_of_the_record(tiny_page: dict[str, Any], tmp_path: Path) -> None:
    run = RunConfig.model_validate(tiny_page | {"run_dir": str(tmp_path), "logging": {"peak_tflops": 1.0}})
    bad = replace(_result(), cross_entropy=torch.tensor(math.nan), gradient_norm=torch.tensor(math.inf))
    with Tracker.open(run, speaks=True, step=0) as tracker:
        Meter(run, Ranks(), tracker).skipped(bad, "its loss is nan", step=1, in_a_row=1, skipped=1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail).keys() == {
        "step",
        "skipped",
        "skipped_in_a_row",
        "skipped_steps",
    }
