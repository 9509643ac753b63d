"""A run's folder -> what stands in checkpoints/, trusted or not, without reading a tensor."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from moe.checkpoint import folder as folders
from moe.checkpoint import retention
from moe.checkpoint.folder import Layout
from moe.errors import CheckpointError


@dataclass(frozen=True)
class Entry:
    """A folder of checkpoints/."""

    name: str
    state: str
    """complete: the manifest and files of the right size are there; torn: a leftover; damaged: neither."""
    date: str
    """ISO 8601, UTC; of the manifest, or of the folder."""
    num_bytes: int
    """As found, the manifest included."""
    step: int | None = None
    tokens: int | None = None
    layout: Layout | None = None
    fault: str | None = None
    """What is wrong with a damaged one."""


def entries(run_folder: Path) -> list[Entry]:
    """Complete and damaged checkpoints by step, then leftovers. Raises `CheckpointError` if there are none."""
    home = run_folder / "checkpoints"
    numbered = [path for path in home.glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    found = [_entry(path) for path in sorted(numbered, key=lambda path: int(path.name.removeprefix("step_")))]
    cut = [path for path in home.glob(f"{folders.BEFORE}step_*") if path not in retention.leftovers(home)]
    found += [_torn(path) for path in (*cut, *retention.leftovers(home))]
    if not found:
        raise CheckpointError(
            f"{run_folder} holds no checkpoint: it must be the folder of a run that has saved one. "
            f"Give such a folder, or train first."
        )
    return found


def _entry(folder: Path) -> Entry:
    try:
        manifest = folders.read_manifest(folder)
        folders.verify_sizes(folder, manifest)
    except CheckpointError as error:
        return Entry(folder.name, "damaged", _date(folder), _size(folder), fault=str(error))
    return Entry(
        folder.name,
        "complete",
        _date(folder / folders.MANIFEST),
        _size(folder),
        manifest.step,
        manifest.tokens,
        manifest.layout,
    )


def _torn(folder: Path) -> Entry:
    return Entry(folder.name, "torn", _date(folder), _size(folder))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _date(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
