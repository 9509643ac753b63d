"""Exported folders -> what stock code says of them in a process of its own, of any environment."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.hf import compare

# One process for all folders: importing transformers costs more than loading them.
_READ_ALL = """
import importlib.util, json, os, sys
from pathlib import Path
os.environ["HF_HUB_OFFLINE"] = "1"
spec = importlib.util.spec_from_file_location("compare", sys.argv[1])
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)
import torch
from transformers import AutoTokenizer
torch.set_num_threads(1)
for folder in map(Path, sys.argv[2:]):
    try:
        result = {"comparison": compare.measure(folder, folder.with_suffix(".safetensors"))}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        result |= {"ids": tokenizer("!abc<|endoftext|>")["input_ids"], "eos": tokenizer.eos_token_id}
    except ValueError as error:
        result = {"error": str(error)}
    folder.with_suffix(".json").write_text(json.dumps(result))
"""


def read_all(python: Path, folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Name -> `comparison` with the reference beside the folder (`.safetensors`), `ids`, `eos`; or its `error`."""
    subprocess.run([python, "-P", "-c", _READ_ALL, compare.__file__, *folders.values()], check=True)
    return {name: json.loads(folder.with_suffix(".json").read_text()) for name, folder in folders.items()}
