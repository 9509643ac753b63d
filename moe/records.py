"""metrics.jsonl -> training and evaluation records, each step once."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError


@dataclass(frozen=True)
class Records:
    """A run's records in the order of their steps."""

    training: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of the training records that have `name`."""
        rows = [row for row in self.training if row.get(name) is not None]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def per_layer(self, name: str) -> tuple[list[int], list[list[float]]]:
        """Steps, and for each the values of all sparse layers, of the training records that have `name`."""
        rows = [row for row in self.training if (row.get("per_layer") or {}).get(name)]
        return [row["step"] for row in rows], [row["per_layer"][name] for row in rows]


def read(path: Path) -> Records:
    """Read them; a step that a resumed run did again counts as it was done last.

    A torn last line, as a killed run leaves it, is passed over. Raises `CheckpointError`: no file, no training
    record, or another line that is no record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"{path} cannot be read ({reason}). Give the folder of a run that has begun."
        ) from None
    training: dict[int, dict[str, Any]] = {}
    evaluation: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _record(line)
        if row is None and number == len(lines):
            continue
        if row is None:
            raise CheckpointError(
                f"{path}, line {number}, is not a record: {line[:60]!r}. Remove the line, or restore the file."
            )
        if "validation_loss" in row:
            evaluation[row["step"]] = row
        if "loss" in row:
            training[row["step"]] = row
    if not training:
        raise CheckpointError(f"{path} holds no training step yet: train first, then draw.")
    return Records(
        [training[step] for step in sorted(training)], [evaluation[step] for step in sorted(evaluation)]
    )


def _record(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
