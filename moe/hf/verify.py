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


def verify(
    folder: Path, model: ModelConfig, read: "Read", dtype: Dtype, *, python: str = sys.executable
) -> Comparison:
    """Compare the logits of `folder`, loaded by a fresh `python` with stock code, with those of our `Transformer`.

    Ours runs on the weights rounded to `dtype`, as they are on disk, so one tolerance holds for both. Raises
    `ExportError`: stock code cannot load the folder, or `Comparison.equal` is false.
    """
    with tempfile.TemporaryDirectory(prefix="turnout-verify-") as scratch:
        reference, report = Path(scratch) / "reference.safetensors", Path(scratch) / "report.json"
        save_reference(reference, model, read, dtype)
        # -P: this script's siblings must not hide standard modules.
        child = subprocess.run(
            [python, "-P", compare.__file__, str(folder), str(reference), str(report)],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode or not report.is_file():
            last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
            raise ExportError(f"stock transformers cannot load the export ({last[0]}): nothing was exported.")
        result = Comparison(**json.loads(report.read_text(encoding="utf-8")))
    if not result.equal:
        keys = (
            f", and these names do not match: {', '.join(result.wrong_keys[:5])}" if result.wrong_keys else ""
        )
        raise ExportError(
            f"transformers {result.transformers} differs from the trained model by {result.max_difference:.3g} with "
            f"logits up to {result.logit_scale:.3g} (relative {result.relative_difference:.1e}, allowed "
            f"{TOLERANCE:.0e}; KL {result.kl:.1e}){keys}: nothing was exported. Please report the recipe as a bug."
        )
    return result


def our_logits(
    model: ModelConfig, read: "Read", input_ids_BS: "torch.Tensor", dtype: Dtype = "fp32"
) -> "torch.Tensor":
    """Logits of our `Transformer`, float32 [B, S, V], on weights rounded to `dtype`."""
    import torch

    from moe.model.transformer import Transformer

    transformer = Transformer(model)
    with torch.inference_mode():
        for name, parameter in transformer.named_parameters():
            parameter.copy_(read(name).to(getattr(torch, TORCH_NAMES[dtype])))
        logits_BSV: torch.Tensor = transformer.float().eval()(input_ids_BS)
        return logits_BSV.float()


def save_reference(path: Path, model: ModelConfig, read: "Read", dtype: Dtype) -> None:
    """Write two sequences of random ids and our logits of them to `path`, as `moe.hf.compare` reads them."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    shape = (2, min(model.max_sequence_length, 128))
    input_ids_BS = torch.randint(model.vocab_size, shape, generator=generator)
    logits_BSV = our_logits(model, read, input_ids_BS, dtype)
    save_file({"input_ids_BS": input_ids_BS, "logits_BSV": logits_BSV.contiguous()}, path)
