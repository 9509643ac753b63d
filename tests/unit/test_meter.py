"""What a step's record holds, and that nothing is read from the device until one is due."""

import json
import logging
import statistics
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moe.metrics
from moe import log
from moe.config import RunConfig
from moe.data import loader
from moe.dist import Ranks
from moe.metrics import Meter, Tracker
from moe.sparse.health import Health

Page = dict[str, Any]
COUNTS = [[4, 0, 12, 0, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2, 2, 2]]
UNUSED = [[0, 100, 0, 101, 7, 99, 3, 1], [0, 0, 0, 0, 0, 0, 0, 0]]


@dataclass(frozen=True)
class Result:
    cross_entropy: torch.Tensor
    load_balancing: torch.Tensor
    router_z: torch.Tensor
    further: torch.Tensor
    gradient_norm: torch.Tensor
    learning_rate: float
    num_tokens: int
    tokens_per_expert: torch.Tensor | None
    num_dropped: torch.Tensor | None
    health: Health | None


def _result(device: str = "cpu") -> Result:
    def layers(first: float) -> torch.Tensor:
        return torch.tensor([first, 2 * first], dtype=torch.float64, device=device)

    one = torch.tensor(1.5, device=device)
    return Result(
        cross_entropy=one,
        load_balancing=one,
        router_z=one,
        further=one,
        gradient_norm=one,
        learning_rate=0.1,
        num_tokens=256,
        tokens_per_expert=torch.tensor(COUNTS, device=device),
        num_dropped=torch.tensor([4, 0], device=device),
        health=Health(layers(0.25), layers(0.5), layers(3.0), layers(8.0), layers(6.0)),
    )


class Board:
    def __init__(self) -> None:
        self.seen: dict[int, Page] = {}

    def log(self, values: Page, step: int) -> None:
        self.seen[step] = values


def _records(
    page: Page, folder: Path, result: Result, unused: torch.Tensor | None, board: Any = None
) -> list[Page]:
    run = RunConfig.model_validate(page | {"run_dir": str(folder), "logging": {"peak_tflops": 1.0}})
    Meter(run, Ranks(), Tracker(run, 0, None, board)).step(result, step=1, tokens=256, unused=unused)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_record_says_how_each_layer_fares(tiny_page: Page, tmp_path: Path) -> None:
    tiny_page["balance"] = {"capacity_factor": 1.0}
    board = Board()
    (record,) = _records(tiny_page, tmp_path, _result(), torch.tensor(UNUSED), board)
    assert record["tokens_per_expert"] == COUNTS
    assert (record["max_violation"], record["dead_experts"], record["dropped"]) == (5.0, 2, 4 / 32)
    entropy = (0.25 * 2.0 + 0.75 * (2.0 - 1.584962500721156)) / 3.0  # bits, of 4 and 12; over log2 8
    assert record["per_layer"] == {
        "max_violation": [5.0, 0.0],
        "load_entropy": pytest.approx([entropy, 1.0]),
        "dropped": [0.25, 0.0],
        "dead_experts": [2, 0],
        "steps_since_use": [101, 0],
        "token_entropy": [0.25, 0.5],
        "router_entropy": [0.5, 1.0],
        "logit_rms": [3.0, 6.0],
        "logit_max": [8.0, 16.0],
        "log_sum_exp_max": [6.0, 12.0],
    }
    scalars = board.seen[1]
    assert scalars["dead_experts/layer_0"] == 2
    assert scalars["logit_max/layer_1"] == 16.0
    assert all(isinstance(value, int | float) for value in scalars.values())


def test_what_a_run_does_not_have_is_not_in_its_record(tiny_page: Page, tmp_path: Path) -> None:
    (record,) = _records(tiny_page, tmp_path, replace(_result(), health=None), None)
    assert record["per_layer"].keys() == {"max_violation", "load_entropy"}
    assert {"dropped", "dead_experts"} & record.keys() == set()
    biased = Health(*[torch.zeros(2)] * 5, bias_min=torch.full((2,), -0.5), bias_max=torch.zeros(2))
    (_, record) = _records(tiny_page, tmp_path, replace(_result(), health=biased), None)
    assert record["per_layer"]["bias_min"] == [-0.5, -0.5]
    tiny_page["model"] |= {"moe": None, "intermediate_size": 64}
    dense = replace(_result(), tokens_per_expert=None, num_dropped=None, health=None)
    (*_, record) = _records(tiny_page, tmp_path, dense, None)
    assert {"per_layer", "max_violation", "tokens_per_expert"} & record.keys() == set()


def test_every_key_is_explained(tiny_page: Page, tmp_path: Path) -> None:
    tiny_page["balance"] = {"capacity_factor": 1.0}
    health = Health(*[torch.zeros(2)] * 7)
    (record,) = _records(tiny_page, tmp_path, replace(_result(), health=health), torch.tensor(UNUSED))
    assert moe.metrics.__doc__
    keys = record.keys() | record["per_layer"].keys()
    assert len(keys) > 20
    assert {key for key in keys if f"`{key}`" not in moe.metrics.__doc__} == set()


def test_dead_experts_are_said_aloud_if_there_are_any(
    tiny_page: Page, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log.get(), "propagate", True)
    with caplog.at_level(logging.INFO, logger=log.LOGGER_NAME):
        _records(tiny_page, tmp_path, _result(), torch.tensor(UNUSED) // 2)
        assert "max violation 5.00" in caplog.text
        assert "dead experts" not in caplog.text
        _records(tiny_page, tmp_path, _result(), torch.tensor(UNUSED))
    assert "max violation 5.00  dead experts 2" in caplog.text


@pytest.mark.parametrize(("reading", "working"), [(0.1, 0.01), (0.001, 0.1)])
def test_the_share_of_a_step_that_waits_for_data_is_on_record_and_said(
    reading: float,
    working: float,
    tiny_page: Page,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock of the test's own: a slow source is most of a step, a fast one next to nothing."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(log.get(), "propagate", True)
    page = tiny_page | {"run_dir": str(tmp_path), "logging": {"peak_tflops": 1.0, "every_steps": 2}}
    run = RunConfig.model_validate(page)
    meter = Meter(run, Ranks(), Tracker(run, 0, None, None))
    with caplog.at_level(logging.INFO, logger=log.LOGGER_NAME):
        for step in range(1, 5):
            with meter.waiting():
                now[0] += reading
            now[0] += working
            meter.step(_result(), step=step, tokens=256 * step)
            with meter.stopped():
                now[0] += 7.0
    share = reading / (reading + working)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["data_wait"] for record in records] == pytest.approx([share, share])
    said = {line for line in caplog.messages if f"data wait {100 * share:.1f} %" in line}
    assert len(said) == len(records)


class Slow:
    """A source whose every element takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        time.sleep(self._seconds)
        return index


@pytest.mark.parametrize(("reading", "working", "low", "high"), [(0.08, 0.01, 0.6, 1), (0.005, 0.08, 0, 0.3)])
def test_steps_wait_for_a_slow_source_and_not_for_one_that_is_read_ahead(
    reading: float, working: float, low: float, high: float, tiny_page: Page, tmp_path: Path
) -> None:
    """In the middle of nine steps: a machine that stands still holds up some of them."""
    page = tiny_page | {"run_dir": str(tmp_path), "logging": {"peak_tflops": 1.0}}
    run = RunConfig.model_validate(page)
    with closing(loader._prefetched(Slow(reading), 0)) as elements:  # type: ignore[type-var]  # a generator
        next(elements)
        meter = Meter(run, Ranks(), Tracker(run, 0, None, None))
        for step in range(1, 10):
            with meter.waiting():
                next(elements)
            time.sleep(working)
            meter.step(_result(), step=step, tokens=256 * step)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert low <= statistics.median(json.loads(line)["data_wait"] for line in lines) <= high


def test_nothing_is_read_until_a_record_is_due(tiny_page: Page, tmp_path: Path) -> None:
    """Tensors on the meta device have no values: whoever asked for one would fail."""
    page = tiny_page | {"run_dir": str(tmp_path), "logging": {"peak_tflops": 1.0, "every_steps": 3}}
    run = RunConfig.model_validate(page)
    meter = Meter(run, Ranks(), Tracker(run, 0, None, None))
    nowhere = _result("meta")
    unused = torch.tensor(UNUSED, device="meta")
    assert [step for step in range(1, 9) if meter.due(step)] == [3, 6, 8]
    for step in (1, 2, 4, 5, 7):
        meter.step(nowhere, step=step, tokens=step, unused=unused)
    assert not (tmp_path / "metrics.jsonl").exists()
    with pytest.raises((RuntimeError, NotImplementedError)):
        meter.step(nowhere, step=8, tokens=8, unused=unused)


@pytest.mark.parametrize(
    ("before", "level", "said"),
    [
        (
            1.5,
            logging.INFO,
            "step 3 was taken before: its loss was 1.500000 and is 1.500000, relative difference 0",
        ),
        (1.5 * (1 + 5e-5), logging.INFO, "relative difference 5.0e-05"),
        (1.501, logging.WARNING, "relative difference 6.7e-04: above 1e-04, so look at what has changed"),
        (None, None, ""),
    ],
)
def test_a_step_taken_again_is_compared_with_what_it_was(
    before: float | None,
    level: int | None,
    said: str,
    tiny_page: Page,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines: list[Page] = [
        {"step": 2, "loss": 9.0},
        {"step": 4, "loss": 9.0},
        {"step": 3, "validation_loss": 9.0},
    ]
    if before is not None:
        lines.insert(1, {"step": 3, "loss": before})
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo'
    )
    run = RunConfig.model_validate(tiny_page | {"run_dir": str(tmp_path), "logging": {"peak_tflops": 1.0}})
    log.get().propagate, log.get().handlers = True, []  # caplog's may be left there by another test
    with (
        caplog.at_level(logging.INFO, log.LOGGER_NAME),
        Tracker.open(run, speaks=True, step=2) as tracker,
    ):
        meter = Meter(run, Ranks(), tracker)
        for step in (3, 4):
            meter.step(_result(), step=step, tokens=256 * step)
    about = [record for record in caplog.records if "taken before" in record.getMessage()]
    assert [record.levelno for record in about] == ([level] if level else [])
    assert all(said in record.getMessage() for record in about)
