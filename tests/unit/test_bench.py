"""The benchmark's answers are right for everyone, and a wrong one is noticed."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from moe.bench import layer
from moe.bench.peers import ENTRIES
from moe.bench.problem import Problem, Shape, solve

TINY = [
    "--tokens",
    "64",
    "--hidden",
    "32",
    "--inner",
    "16",
    "--experts",
    "8",
    "--top-k",
    "2",
    "--rounds",
    "1",
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contender_solves_the_same_problem(dtype: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        layer.command, [*TINY, "--dtype", dtype, "--json", str(tmp_path / "layer.json")]
    )
    assert done.exit_code == 0, done.output
    page = json.loads((tmp_path / "layer.json").read_text())
    lines = {line["name"]: line for line in page["lines"]}
    assert set(lines) == {entry.name for entry in ENTRIES}
    assert lines["dense limit"]["ratio"] == 1.0
    assert all(line["version"] for line in lines.values())
    assert all(line["error"] <= layer.BOUND[dtype] for line in lines.values() if line["error"] is not None)


def test_a_wrong_answer_is_noticed() -> None:
    problem = Problem.draw(Shape(64, 32, 16, 8, 2), torch.float32)
    right = solve(problem)
    ours = next(entry for entry in ENTRIES if entry.name == "turnout").build(problem)
    ours.layer.experts.down.data[3].mul_(1.01)  # type: ignore[union-attr,index]  # a SparseMoE
    error = layer._check(ours, problem, right)
    assert error is not None
    assert error > layer.BOUND["fp32"]
