"""The release line before the fused layout: it renamed nothing yet, and silently takes defaults for what it misses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe.hf import compare
from moe.hf.verify import Comparison, save_reference
from moe.hf.write import new_folder, write
from tests.stock import CASES, saved, write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OLDER = "4.57.6"

# One process for all folders: importing transformers costs more than loading them.
READ_ALL = """
import importlib.util, json, os, sys
from pathlib import Path
os.environ["HF_HUB_OFFLINE"] = "1"
spec = importlib.util.spec_from_file_location("compare", sys.argv[1])
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)
from transformers import AutoTokenizer
for folder in map(Path, sys.argv[2:]):
    result = compare.measure(folder, folder.with_suffix(".safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = {"comparison": result, "ids": tokenizer("!abc<|endoftext|>")["input_ids"], "eos": tokenizer.eos_token_id}
    folder.with_suffix(".json").write_text(json.dumps(result))
"""


@pytest.fixture(scope="module")
def older_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with the older transformers."""
    home = tmp_path_factory.mktemp("older")
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin" / "python"
    packages = [f"transformers=={OLDER}", "torch>=2.11,<2.14", "numpy>=2,<3"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def test_the_older_release_gives_our_logits_for_every_architecture(
    older_python: Path, tmp_path: Path
) -> None:
    folders = {name: tmp_path / f"case{number}" for number, name in enumerate(CASES)}
    for name, folder in folders.items():
        _export(name, folder)
    # The control: without the older spelling it loads, says nothing, and computes something else.
    folders["control"] = tmp_path / "control"
    _export("qwen3", folders["control"], lambda page: page.pop("rope_theta"))
    subprocess.run([older_python, "-P", "-c", READ_ALL, compare.__file__, *folders.values()], check=True)
    found = {name: json.loads(folder.with_suffix(".json").read_text()) for name, folder in folders.items()}
    compared = {name: Comparison(**result["comparison"]) for name, result in found.items()}
    assert {result.transformers for result in compared.values()} == {OLDER}
    control = compared.pop("control")
    assert not control.wrong_keys
    assert control.relative_difference > 1e-3
    assert not {name: result for name, result in compared.items() if not result.equal}
    # "!" is byte 0 of the byte-level alphabet, the end of text the last token.
    assert {(result["ids"][0], result["ids"][-1], result["eos"]) for result in found.values()} == {
        (0, 96, 96)
    }


def _export(name: str, folder: Path, change: Callable[[dict[str, Any]], object] = lambda page: None) -> None:
    source = saved(CASES[name][1])
    tokenizer = write_tokenizer(folder.parent / "tokenizer")
    with new_folder(folder) as new:
        write(new, source.run, source.step, source.names(), source.pieces, tokenizer)
    page = json.loads((folder / "config.json").read_text())
    change(page)
    (folder / "config.json").write_text(json.dumps(page))
    save_reference(folder.with_suffix(".safetensors"), source.run.model, source.pieces, "fp32")
