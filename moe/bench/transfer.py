"""A large model on disk -> memory and time that importing and exporting it take: `python -m moe.bench.transfer`.

The model is made piece by piece, in Qwen3-MoE's form, and every command runs in a process of its own, whose largest
resident memory the system tells. What the same command needs for a model of a few kilobytes is taken off.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from moe import figures, log
from moe.config import ModelConfig
from moe.errors import LaunchError, clean_exit

if TYPE_CHECKING:
    import torch

SHARD = 200 * 10**6
"""Bytes of the largest weight file, read or written."""


@dataclass(frozen=True)
class Transfer:
    """What one command took."""

    command: str
    model_bytes: int
    shard_bytes: int
    peak_bytes: int
    """Resident memory at its largest, above that of the same command on a tiny model."""
    seconds: float

    @property
    def shards(self) -> float:
        """Its memory, in weight files."""
        return self.peak_bytes / self.shard_bytes


def model(gigabytes: float) -> ModelConfig:
    """Qwen3-MoE's form with 48 experts a layer and as many layers as it takes in float32."""
    hidden, inner, experts = 1024, 640, 48
    layer = 3 * hidden * inner * experts * 4
    return ModelConfig.model_validate(
        {
            "vocab_size": 300,
            "hidden_size": hidden if gigabytes else 16,
            "num_layers": max(1, round(gigabytes * 1e9 / layer)),
            "attention": {"num_heads": 8, "num_kv_heads": 2},
            "moe": {
                "num_experts": experts,
                "top_k": 2,
                "expert_intermediate_size": inner if gigabytes else 16,
            },
        }
    )


def make(config: ModelConfig, folder: Path) -> None:
    """Write the model, every piece a constant of its own, as a Hugging Face folder with a byte-level tokenizer."""
    from moe.hf.convert import moves
    from moe.hf.match import family_of
    from moe.hf.write import new_folder, write_model

    plan = {move.ours: move for move in moves(family_of(config), config)}

    def pieces(name: str) -> "Iterator[torch.Tensor]":
        import torch

        for number in range(plan[name].num_pieces):
            yield torch.full(plan[name].piece_shape, float(number + 1))

    with tempfile.TemporaryDirectory() as scratch, new_folder(folder) as new:
        tokenizer = _tokenizer(Path(scratch))
        write_model(new, config, list(plan), pieces, tokenizer, "", max_shard_size=SHARD)


def measure(gigabytes: float, scratch: Path) -> list[Transfer]:
    """Import a model of that size, and export what was imported."""
    found = {}
    for name, size in (("tiny", 0.0), ("large", gigabytes)):
        stock, native, out = (scratch / f"{name}-{kind}" for kind in ("stock", "native", "out"))
        make(model(size), stock)
        limit = f"{SHARD // 10**6}MB"
        verbs = {
            "import": ["moe.ingest", str(stock), "--to", str(native), "--max-shard-size", limit],
            "export": ["moe.export", str(native), "--to", str(out), "--max-shard-size", limit],
        }
        found[name] = {verb: _run(command) for verb, command in verbs.items()}
        number = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return [
        Transfer(verb, number, SHARD, peak - found["tiny"][verb][0], seconds)
        for verb, (peak, seconds) in found["large"].items()
    ]


def _run(command: list[str]) -> tuple[int, float]:
    """(largest resident memory, seconds) of a module run with arguments; raises `LaunchError` if it fails."""
    begin = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise LaunchError(f"{' '.join(command)} ended with exit code {child.returncode}: see above.")
    return usage.ru_maxrss * 1024, time.perf_counter() - begin


def _tokenizer(folder: Path) -> Path:
    """The 256 bytes and an end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    page = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(page))
    return folder


@click.command()
@click.option("--gigabytes", type=click.FloatRange(0.1), default=2.5, show_default=True, help="In float32.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Where there is room for three such models.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the figures to this file too."
)
def command(gigabytes: float, scratch: Path | None, json_path: Path | None) -> None:
    """Measure the memory of `turnout import` and `turnout export` on a model made for it."""
    log.setup()
    with clean_exit():
        if json_path is not None:
            figures.check_place(json_path)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            found = measure(gigabytes, Path(folder))
        table = Table("command", "model GB", "weight file MB", "memory MB", "in files", "seconds")
        for one in found:
            table.add_row(
                one.command,
                f"{one.model_bytes / 1e9:.2f}",
                f"{one.shard_bytes / 1e6:.0f}",
                f"{one.peak_bytes / 1e6:.0f}",
                f"{one.shards:.2f}",
                f"{one.seconds:.1f}",
            )
        Console().print(table)
        if json_path is not None:
            figures.write(json_path, json.dumps([asdict(one) for one in found], indent=2) + "\n")


if __name__ == "__main__":
    command()
