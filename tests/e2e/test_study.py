"""A tiny study from text to tables: stopped on the way, gone on with, and not made twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.e2e.test_launchers import DATA, RECIPE

STEPS = 12
POLICY = "balance.sequence_loss_weight=0"
MADE = ["dense_lr0.001_seed1", "sparse_lr0.001_seed1", "sparse_none_lr0.001_seed1"]


def _place(folder: Path) -> Path:
    (folder / "data.yaml").write_text(yaml.safe_dump(DATA))
    base = {key: value for key, value in RECIPE.items() if key != "parallel"}
    base["train"] = {**base["train"], "steps": STEPS, "micro_batch_size": 8}  # type: ignore[dict-item]
    model = {**base["model"], "max_sequence_length": 32}  # type: ignore[dict-item]
    moe = model.pop("moe")
    recipes = {"dense": {**model, "intermediate_size": 32}, "sparse": {**model, "moe": moe}}
    for name, shape in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**base, "model": shape}))
    plan = {
        "name": "tiny",
        "data": "data.yaml",
        "models": {name: {"recipe": f"{name}.yaml"} for name in recipes},
        "learning_rates": [1e-3],
        "seeds": [1],
        "policies": {"model": "sparse", "seeds": [1], "choices": {"none": [POLICY], "sequence": []}},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return folder


def _study(folder: Path) -> "subprocess.Popen[str]":
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "moe.bench.study", "plan.yaml"]
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_goes_on_where_it_was_stopped_and_makes_no_run_twice(tmp_path: Path) -> None:
    folder = _place(tmp_path)
    runs = folder / "runs" / "tiny"
    process = _study(folder)
    deadline = time.monotonic() + 200
    while not (runs / MADE[1] / "metrics.jsonl").is_file():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert not [child for child in psutil.process_iter() if _works_in(child, folder)]
    first = (runs / MADE[0] / "done").stat()
    assert not (runs / "results.json").exists()

    process = _study(folder)
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert (runs / MADE[0] / "done").stat() == first
    assert sorted(path.parent.name for path in runs.glob("*/done")) == MADE
    results = json.loads((runs / "results.json").read_text())
    assert results["results"]["policies"]["sequence"] == results["results"]["final"]["sparse"]
    for name, expected in (("dense", None), ("sparse", 16)):
        (run,) = results["results"]["final"][name]
        evaluation = json.loads((runs / MADE[0 if name == "dense" else 1] / "evaluation.json").read_text())
        assert (run["step"], run["loss"]) == (STEPS, evaluation["loss"])
        assert (run["load"] and run["load"]["experts"]) == expected
        for tokens_E in evaluation["tokens_per_expert"] or ():
            assert sum(tokens_E) == 2 * evaluation["tokens"]  # top 2
    assert (runs / "tables.md").read_text() in said
    assert (runs / "study.png").is_file()

    words = {path: path.read_text() for path in (runs / "logs").glob("*seed1.log")}
    process = _study(folder)
    again, errors = process.communicate(timeout=200)
    assert (process.returncode, again) == (0, said), errors
    assert words == {path: path.read_text() for path in (runs / "logs").glob("*seed1.log")}


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
