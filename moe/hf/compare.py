"""A Hugging Face folder and saved logits -> how far stock `transformers` is from them; a process of its own.

`python -P compare.py FOLDER REFERENCE REPORT [DTYPE]` needs only torch, transformers and safetensors, any version of
them that can read the folder. REFERENCE is a safetensors file with `input_ids_BS` (int64) and `logits_BSV` (float32);
REPORT is written as JSON: the fields of `moe.hf.verify.Comparison`. With DTYPE (`bfloat16`) the folder's parameters
are rounded to it first. Nothing of ours is imported here.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def measure(folder: Path, reference: Path, rounded_to: str = "float32") -> dict[str, Any]:
    """Load `folder` in float32 with `AutoModelForCausalLM`, run the reference's sequences, compare logits.

    Parameters, but no buffers, are rounded to `rounded_to` in between.
    """
    import torch
    import transformers
    from safetensors.torch import load_file

    saved = load_file(reference)
    # The plain loop over experts: the fused kernel refuses some widths, and 4.x has no such choice.
    choice = {"experts_implementation": "eager"} if int(transformers.__version__.split(".")[0]) >= 5 else {}
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, **choice
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, rounded_to)).float()
    with torch.inference_mode():
        theirs_BSV = model.eval()(input_ids=saved["input_ids_BS"]).logits.double()
    ours_BSV = saved["logits_BSV"].double()
    ours, theirs = ours_BSV.log_softmax(-1), theirs_BSV.log_softmax(-1)
    return {
        "max_difference": float((ours_BSV - theirs_BSV).abs().max()),
        "logit_scale": float(ours_BSV.abs().max()),
        "kl": float((ours.exp() * (ours - theirs)).sum(-1).mean()),
        "num_positions": ours_BSV.shape[0] * ours_BSV.shape[1],
        "wrong_keys": sorted(
            str(key)
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            for key in loading.get(kind) or ()
            if not _of_prediction(str(key), model.config)
        ),
        "transformers": transformers.__version__,
    }


def _of_prediction(key: str, config: Any) -> bool:
    """Whether a key belongs to a prediction module, which stock code loads for generation alone."""
    parts = key.split(".")
    numbered = len(parts) > 3 and parts[:2] == ["model", "layers"] and parts[2].isdigit()
    modules = getattr(config, "num_nextn_predict_layers", 0) or 0
    return numbered and 0 <= int(parts[2]) - config.num_hidden_layers < modules


def main() -> None:
    """Run the comparison that the command line names."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder, reference, report = (Path(argument) for argument in sys.argv[1:4])
    report.write_text(json.dumps(measure(folder, reference, *sys.argv[4:5])), encoding="utf-8")


if __name__ == "__main__":
    main()
