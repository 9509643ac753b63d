"""A proof -> a table for people, and a certificate for files."""

import json
import math
import os
import platform
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe.certify.layouts import Layout
from moe.certify.parts import Deviation
from moe.certify.prove import Proof, Trial
from moe.checkpoint.certificate import FORMAT, VERSION, recipe_hash
from moe.errors import ConfigError

SHOWN = 4
"""Findings of a layout on the screen; those after the first mostly follow from it."""
COLUMNS: dict[str, tuple[str, ...]] = {
    "goes on": ("after resume", "after resize", "resume:", "resize"),
    "tokens": ("tokens per expert", "padding", "zero-token"),
    "losses": ("loss", "cross-entropy"),
    "gradients": ("gradient of",),
    "norm, clip": ("gradient norm", "clip factor"),
    "optimizer": ("optimizer step", "AdamW"),
    "bias": ("selection bias",),
}
"""Column -> words of its checks; the first that fits has them."""


def show(proof: Proof, console: Console) -> None:
    """Print what came out: a row for each layout, then what is wrong."""
    table = Table("layout", *_columns(proof), "", title="largest relative deviation from one process")
    for trial in proof.trials:
        table.add_row(*_row(trial, _columns(proof), proof.trials.index(trial) == 0))
    console.print(table)
    for trial in proof.trials:
        for finding in trial.findings[:SHOWN]:
            console.print(Text(f"{trial.layout}: {sentence(finding)}", style="red"), soft_wrap=True)
        if len(trial.findings) > SHOWN:
            console.print(f"{trial.layout}: {len(trial.findings) - SHOWN} more checks fail with them.")
    for layout, reason in proof.left_out:
        console.print(f"left out: {layout}: {reason}", soft_wrap=True, markup=False)
    failed = sum(bool(trial.findings) for trial in proof.trials)
    console.print(
        f"{len(proof.trials) - failed} of {len(proof.trials)} trainings of a small {proof.recipe.name} on "
        f"{proof.device} do what one process and the rules say" + (f"; {failed} do not." if failed else ".")
    )


def sentence(finding: Deviation) -> str:
    """One failed check in words."""
    if math.isfinite(finding.deviation):
        far = f"off by {finding.deviation:.2g} (bound {finding.bound:.2g})"
    else:
        far = "not there, or not finite"
    where = f", first in {finding.tensor}" if finding.tensor else ""
    said = f": {finding.said}" if finding.said else ""
    return f"step {finding.step + 1}: {finding.check} is {far}{where}{said}"


def _columns(proof: Proof) -> list[str]:
    used = {_column(deviation.check) for trial in proof.trials for deviation in trial.deviations}
    return [column for column in [*list(COLUMNS)[1:], "goes on", "state"] if column in used]


def _column(check: str) -> str:
    return next((c for c, words in COLUMNS.items() if any(word in check for word in words)), "state")


def _row(trial: Trial, columns: Sequence[str], first: bool) -> list[Text]:
    cells = []
    for column in columns:
        here = [deviation for deviation in trial.deviations if _column(deviation.check) == column]
        right = all(deviation.passed for deviation in here)
        far = max((deviation.deviation for deviation in here), default=0.0)
        shown = "" if not here else "0" if far == 0 else f"{far:.0e}"
        cells.append(Text(shown, style="" if right else "red"))
    verdict = Text("fails", style="bold red") if trial.findings else Text("passes", style="green")
    name = f"{trial.layout}{' (reference)' if first else ''}"
    return [Text(name), *cells, verdict]


def certificate(proof: Proof) -> dict[str, Any]:
    """All of it as plain data."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "verdict": "pass" if proof.passed else "fail",
        "recipe_sha256": recipe_hash(proof.recipe),
        "recipe": proof.recipe.model_dump(mode="json", exclude={"run_dir": True, "data": {"path"}}),
        "small_recipe": proof.small.model_dump(mode="json", exclude={"run_dir": True, "data": {"path"}}),
        "versions": {
            **{package: version(package) for package in ("turnout", "torch", "deepspeed")},
            "python": platform.python_version(),
        },
        "device": proof.device,
        "trials": [_trial(trial) for trial in proof.trials],
        "left_out": [{"layout": _layout(layout), "reason": reason} for layout, reason in proof.left_out],
    }


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "layout": _layout(trial.layout),
        "verdict": "fail" if trial.findings else "pass",
        "checks": [
            {
                **asdict(deviation),
                # JSON knows no infinity.
                "deviation": deviation.deviation if math.isfinite(deviation.deviation) else None,
                "passed": deviation.passed,
            }
            for deviation in trial.deviations
        ],
    }


def _layout(layout: Layout) -> dict[str, Any]:
    return asdict(layout)


def write(page: dict[str, Any], path: Path) -> None:
    """Write the certificate, whole or not at all. Raises `ConfigError` if it cannot be."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            json.dump(page, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error}). Give --json the path of a file that can be."
        ) from None
    finally:
        partial.unlink(missing_ok=True)
