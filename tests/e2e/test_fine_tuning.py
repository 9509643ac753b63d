"""Conversations to adapters to a stock model, by the commands that a person would use."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import pytest
import torch
import transformers
import yaml

from moe.checkpoint.read import SavedModel
from moe.hf import write
from tests.e2e.test_launchers import BIN, _environment
from tests.unit.corpus import write_jsonl
from tests.unit.test_chat import PLAIN, _tokenizer, _turns

RECIPE: dict[str, Any] = {
    "name": "tuned",
    "seed": 3,
    "model": {
        "vocab_size": 260,
        "hidden_size": 32,
        "num_layers": 2,
        "max_sequence_length": 96,
        "init_std": 0.2,
        "attention": {"num_heads": 4, "num_kv_heads": 2},
        "moe": {"num_experts": 4, "top_k": 2, "expert_intermediate_size": 24},
    },
    "data": {"path": "chat", "sequence_length": 96},
    "lora": {"rank": 4, "alpha": 16, "targets": ["attention", "experts"]},
    "train": {
        "steps": 8,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "precision": "fp32",
        "evaluate_every": 8,
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0},
        "schedule": {"kind": "constant"},
    },
    "balance": {"sequence_loss_weight": 0.0, "global_batch_loss_weight": 0.01},
}


def _turnout(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [BIN / "turnout", *arguments],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def _losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.slow
def test_conversations_become_adapters_that_stock_code_loads(tmp_path: Path) -> None:
    chats = [_turns(f"what is {n} and {n}?", f"{2 * n}, of course") for n in range(60)]
    path = write_jsonl(tmp_path / "chat.jsonl", chats, field="messages")
    data = {
        "name": "chat",
        "output": "chat",
        "sources": [{"type": "chat", "paths": [str(path)]}],
        "tokenizer": {"type": "file", "path": str(_tokenizer(tmp_path / "tokenizer", PLAIN))},
        "validation": {"fraction": 0.1},
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    _turnout(tmp_path, "prepare", "data.yaml")
    layouts = {"one": (1, 1, 1), "sharded": (2, 2, 3)}
    for name, (ranks, ep, zero) in layouts.items():
        layout = [f"parallel.expert_parallel_size={ep}", f"parallel.zero_stage={zero}", f"run_dir={name}"]
        said = _turnout(tmp_path, "train", "recipe.yaml", "--nproc", str(ranks), *layout)
        assert "adapters have" in said
        assert "conversations in chat" in said
    one, sharded = (_losses(tmp_path / name) for name in layouts)
    assert sharded == pytest.approx(one, rel=1e-5)
    assert one[-1] < 0.8 * one[0]
    assert "bits/byte" in _turnout(tmp_path, "evaluate", "sharded")

    merged = _turnout(tmp_path, "export", "sharded", "--to", "merged", "--verify")
    assert "merged its adapters" in merged
    assert "verified" in merged
    _turnout(tmp_path, "export", "sharded", "--to", "adapter", "--adapter")
    saved = SavedModel.open(tmp_path / "sharded")
    (tmp_path / "base").mkdir()
    home = tmp_path / "sharded/tokenizer"
    write.write(tmp_path / "base", saved.run, saved.step, saved.names(), saved.stored, home)
    load = transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.randint(258, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load(tmp_path / "merged", local_files_only=True)(ids).logits
        base = load(tmp_path / "base", local_files_only=True)
        found = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged", local_files_only=True)
    assert tokenizer.chat_template == PLAIN
