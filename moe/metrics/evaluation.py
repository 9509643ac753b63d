"""metrics.jsonl -> the last evaluation up to a step."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Evaluation:
    """On the validation split."""

    step: int
    loss: float
    """Nats per token."""
    bits_per_byte: float


def last(run_folder: Path, step: int) -> Evaluation | None:
    """None: there was none, or its record cannot be read; a card can do without."""
    found = None
    try:
        lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        try:
            record = json.loads(line)
            if "bits_per_byte" in record and record["step"] <= step:
                found = Evaluation(
                    int(record["step"]), float(record["validation_loss"]), float(record["bits_per_byte"])
                )
        except (ValueError, TypeError, KeyError):
            continue
    return found
