"""A mixture of packed documents through `turnout train`: interrupted and resized it sees what one run does."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.corpus import TEXTS, prepared, write_jsonl

RECIPE: dict[str, Any] = {
    "name": "mixed",
    "model": {
        "vocab_size": 320,
        "hidden_size": 32,
        "num_layers": 2,
        "max_sequence_length": 64,
        "prediction_depth": 1,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "sliding_window": 24, "sinks": True},
        "moe": {"num_experts": 4, "top_k": 2, "expert_intermediate_size": 16},
    },
    "train": {
        "steps": 6,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "precision": "fp32",
        "evaluate_every": 3,
        "optimizer": {"learning_rate": 0.003},
        "schedule": {"kind": "constant"},
    },
    "checkpoint": {"every_steps": 2},
}


def _turnout(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "moe.cli", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def _losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= record["data_wait"] <= 1 for record in records if "loss" in record)
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_mixture_of_packed_documents_trains_the_same_resumed_on_other_ranks(tmp_path: Path) -> None:
    web = write_jsonl(tmp_path / "web.jsonl", TEXTS)
    code = write_jsonl(tmp_path / "code.jsonl", [f"def f{n}(): return {n} * {n + 1}" for n in range(90)])
    first = prepared(tmp_path, [{"type": "jsonl", "paths": [str(web)]}])
    tokenizer = {"type": "file", "path": str(first.tokenizer_folder)}
    (tmp_path / "more").mkdir()
    second = prepared(tmp_path / "more", [{"type": "jsonl", "paths": [str(code)]}], tokenizer=tokenizer)
    sources = [
        {"name": "web", "path": str(first.folder), "weight": 3.0, "max_epochs": 100.0},
        {"name": "code", "path": str(second.folder), "weight": 1.0, "max_epochs": 100.0},
    ]
    data = {
        "path": str(first.folder),
        "sequence_length": 64,
        "packing": "best_fit",
        "attend_across_documents": False,
        "mixture": {"sources": sources},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": data}))
    said = _turnout(tmp_path, "train", "recipe.yaml", "run_dir=whole")
    assert re.search(r"training tokens in web: 7\d\.\d\d% of the samples, \d", said)
    _turnout(tmp_path, "train", "recipe.yaml", "run_dir=cut", "train.steps=2")
    _turnout(
        tmp_path, "train", "recipe.yaml", "run_dir=cut", "--nproc", "2", "parallel.expert_parallel_size=2"
    )
    assert _losses(tmp_path / "cut") == pytest.approx(_losses(tmp_path / "whole"), rel=1e-4)
    assert "bits/byte" in _turnout(tmp_path, "evaluate", "whole")
