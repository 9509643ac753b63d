"""A run's certificate, if it has one that fits its recipe -> a small file in every checkpoint."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from moe.checkpoint import folder as folders
from moe.checkpoint.folder import File
from moe.config import RunConfig

CERTIFICATE = "certificate.json"
FORMAT, VERSION = "turnout-certificate", 1
_FREE = {
    "name": True,
    "run_dir": True,
    "data": {"path", "verify_hashes"},
    "train": {"steps", "micro_batch_size", "activation_recomputation", "evaluate_every"},
    "parallel": True,
    "checkpoint": True,
    "logging": True,
}
"""What a certificate does not hang on: names, and what it tries in all ways itself."""


def recipe_hash(run: RunConfig) -> str:
    """SHA-256, hexadecimal, of what is trained."""
    page = run.model_dump(mode="json", exclude=_FREE)  # type: ignore[arg-type]  # pydantic's type is wider than it says
    return hashlib.sha256(json.dumps(page, sort_keys=True).encode()).hexdigest()


def find(run: RunConfig, folder: Path) -> dict[str, Any] | None:
    """The certificate in `folder`, a run's or a checkpoint's.

    None: there is none, or it is of another recipe or format.
    """
    try:
        page = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    expected = {"format": FORMAT, "version": VERSION, "recipe_sha256": recipe_hash(run)}
    return page if isinstance(page, dict) and page.items() >= expected.items() else None


def sentence(page: dict[str, Any]) -> str:
    """What a certificate says, in one line."""
    trials = [trial["verdict"] for trial in page["trials"]]
    versions = ", ".join(f"{package} {number}" for package, number in page["versions"].items())
    return (
        f"{trials.count('pass')} of {len(trials)} trainings of a small copy, in as many layouts, did what one process "
        f"did ({page['device']}; {versions})"
    )


def add(run: RunConfig, folder: Path) -> dict[str, File]:
    """Copy the run's certificate into a checkpoint's folder; its entry in the manifest, if there is one."""
    if find(run, run.folder) is None:
        return {}
    copy = folder / CERTIFICATE
    shutil.copyfile(run.folder / CERTIFICATE, copy)
    return {CERTIFICATE: File(copy.stat().st_size, folders.hash_file(copy))}
