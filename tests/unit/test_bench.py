"""The benchmark's answers are right for everyone, a wrong one is noticed, and what cannot be is said."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from moe.bench import layer, machine
from moe.bench.case import make_case
from moe.bench.compare import BOUND, Report, compare
from moe.bench.peers import ENTRIES, LIMIT, OURS, Contender, Entry, Unavailable
from moe.bench.peers.hf import batched_mm
from moe.bench.peers.ours import Ours
from moe.bench.problem import Problem, Shape
from moe.bench.step import timed
from moe.errors import ConfigError

SHAPE = Shape(tokens=64, hidden=32, inner=16, experts=8, top_k=2)
TINY = [
    *("--tokens", "64", "--hidden", "32", "--inner", "16", "--experts", "8", "--top-k", "2"),
    *("--rounds", "2", "--device", "cpu"),
]
NUMBERS = {"output", "input", "router", "gate", "up", "down"}
DENSE = {"dense limit", "turnout, dense"}
EXTRAS = {"Megatron-Core sequential", "torchtitan", "OLMo-core dropless"}
"""Of packages that are no dependency."""


def run(*options: str) -> Any:
    return CliRunner().invoke(layer.command, [*TINY, *options])


@pytest.mark.parametrize("routing", ["real", "forced"])
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_contender_solves_the_same_problem(dtype: str, routing: str, tmp_path: Path) -> None:
    path = tmp_path / "layer.json"
    done = run("--dtype", dtype, "--routing", routing, "--json", str(path))
    assert done.exit_code == 0, done.output
    assert list(tmp_path.iterdir()) == [path]
    page = json.loads(path.read_text())
    lines = {line["name"]: line for line in page["lines"]}
    reasons = {one["name"]: one["reason"] for one in page["left_out"]}
    expected = (
        {entry.name for entry in ENTRIES} - EXTRAS - ({"DeepSpeed AutoEP"} if routing == "forced" else set())
    )
    assert expected <= set(lines)
    assert set(lines) | set(reasons) == {entry.name for entry in ENTRIES}
    assert all(reason.startswith("unavailable: ") for reason in reasons.values())
    assert (lines["dense limit"]["ratio"], lines["dense limit"]["error"]) == (1.0, None)
    for name, line in lines.items():
        assert line["version"]
        assert line["rounds"] == 2
        assert 0 < line["forward_s"] < line["total_s"]
        assert line["ratio_quartiles"][0] <= line["ratio"] <= line["ratio_quartiles"][1]
        assert line["peak_extra_bytes"] > SHAPE.tokens * SHAPE.hidden * 2
        assert line["cpu_ratio"] > 0
        assert name in DENSE or line["error"] == max(line["errors"].values()) <= BOUND[dtype]
        assert name in DENSE or set(line["errors"]) == NUMBERS
        assert name in done.stdout
    assert page["matmul_flops_per_s"] > 1e6
    assert page["machine"]["versions"]["torch"] == torch.__version__
    assert page["machine"]["cpu"]


@pytest.mark.parametrize(("batches", "different"), [("same", 1), ("new", 3)])
def test_rounds_have_one_batch_or_each_its_own(
    batches: Any, different: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "moe.bench.compare.timed",
        lambda contender, problem, steps: seen.append(problem.x_TD) or timed(contender, problem, steps),
    )
    compare(make_case(SHAPE, dtype="fp32", device="cpu", rounds=3, batches=batches), (LIMIT, OURS))
    assert len(seen) == 6  # two contenders take each round's
    assert len({x.numpy().tobytes() for x in seen}) == different


class OneExpertOff(Ours):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        down = problem.down_EDF.clone()
        down[3] *= 1.01
        self.layer.experts.down = torch.nn.Parameter(down)


class RouterGradientOff(Ours):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.layer.router.weight.register_hook(lambda gradient: gradient * 1.01)


class WorstExperts(Ours):
    """Right for its choices, but those are not the best."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.layer.router._best = lambda scores_TE: (-scores_TE).topk(2, dim=-1).indices  # type: ignore[method-assign]


def planted(make: Callable[[Problem], Contender]) -> Report:
    case = make_case(SHAPE, dtype="fp32", device="cpu", rounds=1)
    return compare(case, (LIMIT, OURS, Entry("planted", "torch", make)))


@pytest.mark.parametrize("wrong", [OneExpertOff, RouterGradientOff, WorstExperts])
def test_a_wrong_answer_is_noticed(wrong: type[Contender], monkeypatch: pytest.MonkeyPatch) -> None:
    right = {line.name: line.is_right("fp32") for line in planted(wrong).lines}
    assert right == {"dense limit": True, "turnout": True, "planted": False}
    monkeypatch.setattr(layer, "select", lambda only, skip: (LIMIT, Entry("planted", "torch", wrong)))
    done = run()
    assert done.exit_code == 1
    assert "wrong numbers: planted" in done.stderr


def test_other_choices_are_judged_on_their_own() -> None:
    line = next(line for line in planted(WorstExperts).lines if line.name == "planted")
    assert line.error is not None
    assert line.error < BOUND["fp32"]
    assert line.other_choices > 0.9


def test_who_fails_does_not_take_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Ours):
        def forward(self, x_TD: Tensor) -> Tensor:
            raise RuntimeError("no kernel\nfor this")

    report = planted(Failing)
    assert [(one.name, one.reason, one.failed) for one in report.left_out] == [
        ("planted", "failed: RuntimeError: no kernel", True)
    ]
    assert {line.name for line in report.lines} == {"dense limit", "turnout"}
    monkeypatch.setattr(layer, "select", lambda only, skip: (LIMIT, Entry("planted", "torch", Failing)))
    done = run()
    assert done.exit_code == 1
    assert "failed: planted" in done.stderr
    assert "dense limit" in done.stdout


def test_who_cannot_take_part_is_named_with_the_reason() -> None:
    def absent(problem: Problem) -> Contender:
        raise ModuleNotFoundError(name="some_kernels")

    case = make_case(SHAPE, dtype="fp32", device="cpu", rounds=1, routing="forced")
    entries = (
        LIMIT,
        Entry("a", "no-such-package", absent),
        Entry("b", "torch", absent, forced=False),
        Entry("c", "torch", absent),
    )
    assert [(one.name, one.reason, one.failed) for one in compare(case, entries).left_out] == [
        ("a", "unavailable: not installed (no-such-package)", False),
        ("b", "unavailable: its own router cannot be forced into balance", False),
        ("c", "unavailable: it needs some_kernels, which is not installed", False),
    ]


def test_batched_mm_says_that_it_would_not_fit() -> None:
    drawn = Problem.draw(SHAPE, torch.float32)
    huge = Problem(**{**vars(drawn), "shape": Shape(10**9, 32, 16, 8, 2)})
    with pytest.raises(Unavailable, match="GiB"):
        batched_mm(huge)


def test_markdown_has_a_row_for_each_line_and_the_notes() -> None:
    done = run("--markdown", "--only", "turnout", "--only", "olmo")
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 5
    assert len({row.count("|") for row in rows}) == 1
    assert "- OLMo-core dropless: unavailable: " in done.stdout


def test_processor_time_is_shown_for_one_thread_only() -> None:
    one = run("--only", "turnout", "--threads", "1").stdout
    assert "CPU / dense" in one
    if len(os.sched_getaffinity(0)) > 1:
        assert "CPU / dense" not in run("--only", "turnout", "--threads", "2").stdout
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-k", "9"], ["--top-k is 9", "8 experts", "at most 8"]),
        (["--inner", "12"], ["--inner is 12", "multiple of 8"]),
        (["--routing", "forced", "--tokens", "3"], ["6 choices", "multiple of 8"]),
        (["--threads", "100000"], ["--threads is 100000", "processors"]),
        (["--only", "nobody"], ["--only is 'nobody'", "turnout", "torchtitan"]),
        (["--skip", "nobody"], ["--skip is 'nobody'"]),
        (["--only", "hf", "--skip", "eager"], ["--only and --skip"]),
        (["--json", "."], ["folder"]),
        (["--json", "no/such/folder/x.json"], ["no/such/folder", "cannot be written"]),
        (["--shape", "huge"], ["'small', 'olmoe', 'qwen3-30b-a3b'"]),
        (["--allocator", "tuned"], ["--allocator is tuned", "command of its own"]),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(
    options: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "compare", None)
    done = run(*options)
    assert done.exit_code == 2, done.output
    assert all(word in done.stderr for word in words), done.stderr


def test_a_batch_beyond_memory_is_said() -> None:
    done = run("--tokens", str(2**50))
    assert done.exit_code == 2, done.output
    assert "do not fit in memory" in done.stderr
    assert "fewer --tokens" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_device_is_said() -> None:
    done = run("--device", "cuda")
    assert done.exit_code == 2
    assert "--device is cuda" in done.stderr


def test_the_command_starts_anew_with_the_allocator_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "layer.json"
    command = [sys.executable, "-m", "moe.bench.layer", *TINY, "--only", "turnout", "--json", str(path)]
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "123456", "MALLOC_ARENA_MAX": "1"}
    subprocess.run(
        [*command, "--allocator=tuned"], env=environment, check=True, capture_output=True, timeout=120
    )
    found = json.loads(path.read_text())["machine"]
    settings = {name: value for name, value in found["environment"].items() if name.startswith("MALLOC_")}
    assert (found["allocator"], settings) == ("tuned", machine.ALLOCATORS["tuned"])


@pytest.mark.parametrize("allocator", ["default", "tuned"])
@pytest.mark.parametrize("before", [{}, machine.ALLOCATORS["tuned"], {"MALLOC_ARENA_MAX": "1"}])
def test_starting_anew_happens_only_where_the_settings_differ(
    allocator: str, before: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execve", lambda program, arguments, environment: started.append(environment))
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    machine.restart_with(allocator, "moe.bench.layer", [])
    wanted = machine.ALLOCATORS[allocator]
    if before == wanted:
        assert started == []
        machine.check_allocator(allocator, torch.device("cpu"))
        return
    assert [{k: v for k, v in one.items() if k.startswith("MALLOC_")} for one in started] == [wanted]
    with pytest.raises(ConfigError, match="command of its own"):
        machine.check_allocator(allocator, torch.device("cpu"))
