"""An exported folder and the saved model it came from -> the same logits, or an error."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from moe.config import ModelConfig
from moe.errors import ExportError
from moe.hf import compare
from moe.hf.pages import TORCH_NAMES, Dtype

if TYPE_CHECKING:
    import torch

    from moe.hf.convert import Read

SELECTION_BIAS = "selection_bias_E"
TOLERANCE = 1e-5
"""Largest difference of two float32 logits, relative to the largest logit."""


@dataclass(frozen=True)
class Comparison:
    """Stock `transformers` against our own forward pass, both in float32 on the same weights."""

    max_difference: float
    """Largest |difference| of two logits."""
    logit_scale: float
    """Largest |logit| of ours."""
    kl: float
    """KL divergence of theirs from ours, nats, mean over positions."""
    num_positions: int
    wrong_keys: list[str]
    """Disk names that stock code missed, did not expect, or found in another shape."""
    transformers: str
    """Version that was compared."""

    @property
    def relative_difference(self) -> float:
        return self.max_difference / self.logit_scale if self.logit_scale else self.max_difference

    @property
    def equal(self) -> bool:
        """Not NaN, no name left over, and within `TOLERANCE`."""
        finite = isfinite(self.logit_scale) and isfinite(self.kl)
        return finite and not self.wrong_keys and self.relative_difference <= TOLERANCE


@dataclass(frozen=True)
class Words:
    """How errors name what is compared."""

    folder: str = "the export"
    ours: str = "the trained model"
    consequence: str = "nothing was exported"


def verify(
    folder: Path,
    model: ModelConfig,
    read: "Read",
    dtype: Dtype,
    *,
    rounded: bool = False,
    words: Words = Words(),
    python: str = sys.executable,
) -> Comparison:
    """`measure`, which must find the two equal.

    Ours runs on the weights rounded to `dtype`, as they are on disk, so one tolerance holds for both; with `rounded`
    theirs are rounded too. Raises `ExportError`: stock code cannot load the folder, or `Comparison.equal` is false.
    """
    result = measure(folder, model, read, dtype, rounded=rounded, words=words, python=python)
    if not result.equal:
        keys = (
            f", and these names do not match: {', '.join(result.wrong_keys[:5])}" if result.wrong_keys else ""
        )
        raise ExportError(
            f"transformers {result.transformers} differs from {words.ours} by {result.max_difference:.3g} with "
            f"logits up to {result.logit_scale:.3g} (relative {result.relative_difference:.1e}, allowed "
            f"{TOLERANCE:.0e}; KL {result.kl:.1e}){keys}: {words.consequence}. Please report the recipe as a bug."
        )
    return result


def measure(
    folder: Path,
    model: ModelConfig,
    read: "Read",
    dtype: Dtype,
    *,
    rounded: bool = False,
    words: Words = Words(),
    python: str = sys.executable,
) -> Comparison:
    """Compare the logits of `folder`, loaded by a fresh `python` with stock code, with those of our `Transformer`.

    `rounded` and `words` as in `verify`. Raises `ExportError`: stock code cannot load the folder.
    """
    with tempfile.TemporaryDirectory(prefix="turnout-verify-") as scratch:
        reference, report = Path(scratch) / "reference.safetensors", Path(scratch) / "report.json"
        save_reference(reference, model, read, dtype)
        # -P: this script's siblings must not hide standard modules.
        child = subprocess.run(
            [
                *(python, "-P", compare.__file__, str(folder), str(reference), str(report)),
                *([TORCH_NAMES[dtype]] if rounded else []),
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode or not report.is_file():
            last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
            raise ExportError(
                f"stock transformers cannot load {words.folder} ({last[0]}): {words.consequence}."
            )
        return Comparison(**json.loads(report.read_text(encoding="utf-8")))


def our_logits(
    model: ModelConfig, read: "Read", input_ids_BS: "torch.Tensor", dtype: Dtype = "fp32"
) -> "torch.Tensor":
    """Logits of our `Transformer`, float32 [B, S, V], on weights rounded to `dtype`.

    It is its own forward pass, but each of its parts gets weights just before it runs, in memory that all parts of
    that shape share: one layer is held, not the model.
    """
    import torch

    from moe.model.transformer import Transformer

    with torch.device("meta"):
        transformer = Transformer(model).eval()
    parts: dict[str, torch.nn.Module] = {"embed": transformer.embed, "norm": transformer.norm}
    parts |= {f"layers.{index}": layer for index, layer in enumerate(transformer.layers)}
    memory: dict[tuple[str, torch.Size], torch.Tensor] = {}
    for name, part in parts.items():
        _fill_before(part, name, read, dtype, memory)
    _fill_before(transformer.head, "embed" if model.tie_embeddings else "head", read, dtype, memory)
    with torch.inference_mode():
        logits_BSV: torch.Tensor = transformer(input_ids_BS)
    return logits_BSV


def _fill_before(
    part: "torch.nn.Module",
    prefix: str,
    read: "Read",
    dtype: Dtype,
    memory: dict[tuple[str, "torch.Size"], "torch.Tensor"],
) -> None:
    """Have `part`, made on the meta device, take its weights into `memory` whenever it is about to run."""
    import torch

    def fill(_part: torch.nn.Module, _inputs: object) -> None:
        weights = part.state_dict()
        for name, missing in weights.items():
            place = (name, missing.shape)
            if place not in memory:  # malloc would not find room in what a layer before has given back
                memory[place] = torch.empty(missing.shape)
            weights[name] = memory[place]
            for index, piece in enumerate(read(f"{prefix}.{name}")):
                here = weights[name] if piece.shape == missing.shape else weights[name][index]
                wide = name.endswith(SELECTION_BIAS)  # which is float32 on disk too
                here.copy_(piece if wide else piece.to(getattr(torch, TORCH_NAMES[dtype])))
        part.load_state_dict(weights, assign=True)

    part.register_forward_pre_hook(fill)


def save_reference(path: Path, model: ModelConfig, read: "Read", dtype: Dtype) -> None:
    """Write two sequences of random ids and our logits of them to `path`, as `moe.hf.compare` reads them."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    shape = (2, min(model.max_sequence_length, 128))
    input_ids_BS = torch.randint(model.vocab_size, shape, generator=generator)
    logits_BSV = our_logits(model, read, input_ids_BS, dtype)
    save_file({"input_ids_BS": input_ids_BS, "logits_BSV": logits_BSV.contiguous()}, path)
