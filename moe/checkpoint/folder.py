"""checkpoints/step_N: the manifest of what was written, and the checks before anything is believed."""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from moe.config import RunConfig
from moe.errors import CheckpointError

FORMAT = "turnout-checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
TORN = ".torn-"
"""What the name of a folder begins with that is being written or removed."""
BEFORE = ".before-"
"""What the name of a whole checkpoint begins with while another takes its place."""
_BLOCK = 1 << 20
_UNSAID = ("expert_parallel_size", "zero_stage", "micro_batch_size")


@dataclass(frozen=True)
class File:
    """What a file of a checkpoint must be."""

    size: int
    """Bytes."""
    xxh3: str
    """XXH3-128, hexadecimal."""


@dataclass(frozen=True)
class Saved:
    """What a tensor of a checkpoint must be, and where."""

    file: str
    shape: tuple[int, ...]
    xxh3: str | None
    """XXH3-128 of its contiguous bytes, hexadecimal; None: written by version 1, which hashed whole files alone."""


@dataclass(frozen=True)
class Layout:
    """How the ranks were spread that wrote a checkpoint; None: version 1 did not say."""

    world_size: int
    expert_parallel_size: int | None
    zero_stage: int | None
    micro_batch_size: int | None

    @classmethod
    def of(cls, run: RunConfig, world_size: int) -> "Layout":
        """The layout in which `world_size` ranks train `run`."""
        parallel = run.parallel
        return cls(world_size, parallel.expert_parallel_size, parallel.zero_stage, run.train.micro_batch_size)

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'' if self.world_size == 1 else 's'}"
        ep, zero, micro = (
            "?" if value is None else value
            for value in (self.expert_parallel_size, self.zero_stage, self.micro_batch_size)
        )
        return f"{ranks} x EP {ep} x ZeRO {zero}, micro-batch {micro}"


@dataclass(frozen=True)
class Manifest:
    """Written last; a folder without it is no checkpoint."""

    step: int
    """Optimizer steps taken."""
    next_sample: int
    """Position in the endless row of training samples."""
    tokens: int
    """Tokens trained on."""
    layout: Layout
    data_fingerprint: str
    files: dict[str, File]
    tensors: dict[str, Saved]
    """By key; see `moe.checkpoint.state`."""

    @property
    def num_bytes(self) -> int:
        """Of all files but this one."""
        return sum(file.size for file in self.files.values())


def step_folder(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step_{step}"


def torn(folder: Path) -> Path:
    """Where `folder` is written before it has its name, and removed after."""
    return folder.with_name(f"{TORN}{folder.name}")


def steps(run_folder: Path) -> list[int]:
    """Steps of complete checkpoints, oldest first. Folders of torn saves have other names and never count.

    Raises `CheckpointError` for a folder step_N without a manifest: a save never leaves one behind, so something
    was taken out of it; and for one whose name a resize took and, being killed, gave to none.
    """
    home, found = run_folder / "checkpoints", []
    if home.exists() and not home.is_dir():
        raise CheckpointError(
            f"{home} is a file, but checkpoints go into a folder of that name. Move it away."
        )
    for path in home.glob(f"{BEFORE}step_*"):
        folder = path.with_name(path.name.removeprefix(BEFORE))
        if not folder.exists():
            raise CheckpointError(
                f"{path} is {folder.name}, whole, as a resize left it that was ended between two renames. Rename it "
                f"to {folder.name} to go on."
            )
    for path in home.glob("step_*"):
        match = re.fullmatch(r"step_(0|[1-9][0-9]*)", path.name)
        if match and not (path / MANIFEST).is_file():
            raise CheckpointError(
                f"{path} has no {MANIFEST}, and no save leaves such a folder: it was damaged. Restore the file, or "
                f"move {path} away to go on without it."
            )
        if match:
            found.append(int(match[1]))
    return sorted(found)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync the manifest into `folder`."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(manifest)))
    page = {"format": FORMAT, "version": VERSION, "xxh3": _hash_of(content), **content}
    path = folder / MANIFEST
    with path.open("w", encoding="utf-8") as file:
        json.dump(page, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Raises `CheckpointError` if the folder is no checkpoint of this format."""
    try:
        page: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        kind, version = page.pop("format"), page.pop("version")
        if kind != FORMAT or version not in (1, VERSION):
            raise CheckpointError(
                f"{folder}: its manifest says format {kind!r} version {version}, but this version reads {FORMAT!r} "
                f"versions 1 and {VERSION}. Use the version of turnout that wrote it."
            )
        if page.pop("xxh3") != _hash_of(page) or f"step_{page['step']}" != folder.name:
            raise CheckpointError(
                f"{folder / MANIFEST} is not what was written there: it or its folder's name was changed. "
                f"{way_out(folder)}"
            )
        if version == 1:
            page["layout"] = {"world_size": page.pop("world_size"), **dict.fromkeys(_UNSAID)}
            page["tensors"] = {
                key: {"file": file, "shape": (), "xxh3": None} for key, file in page["tensors"].items()
            }
        return manifest_from(page)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} cannot be read ({type(error).__name__}: {error}). {way_out(folder)}"
        ) from None


def manifest_from(page: dict[str, Any]) -> Manifest:
    """From plain data, as JSON has it."""
    files = {name: File(**file) for name, file in page["files"].items()}
    tensors = {
        key: Saved(**saved | {"shape": tuple(saved["shape"])}) for key, saved in page["tensors"].items()
    }
    return Manifest(**page | {"layout": Layout(**page["layout"]), "files": files, "tensors": tensors})


def verify(folder: Path, manifest: Manifest, names: set[str] | None = None) -> None:
    """Hash the files (or those in `names`) against the manifest; raises `CheckpointError` naming the first bad one."""
    for name, expected in manifest.files.items():
        if names is not None and name not in names:
            continue
        _verify_size(folder, name, expected)
        if hash_file(folder / name) != expected.xxh3:
            raise CheckpointError(
                f"{folder / name} does not have the hash it was written with: it was changed. {way_out(folder)}"
            )


def verify_sizes(folder: Path, manifest: Manifest) -> None:
    """The part of `verify` that reads no file."""
    for name, expected in manifest.files.items():
        _verify_size(folder, name, expected)


def _verify_size(folder: Path, name: str, expected: File) -> None:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, but the manifest lists it. {way_out(folder)}")
    size = path.stat().st_size
    if size != expected.size:
        raise CheckpointError(
            f"{path} has {size} bytes, but {expected.size} were written: it was cut or changed. {way_out(folder)}"
        )


def write_atomically(path: Path, text: str) -> None:
    """Write and sync a file that is the old or the new one at every moment."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def hash_file(path: Path) -> str:
    """XXH3-128 of a file's bytes, hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def hash_bytes(content: bytes) -> str:
    """XXH3-128, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def _hash_of(content: dict[str, Any]) -> str:
    return hash_bytes(json.dumps(content, sort_keys=True).encode())


def way_out(folder: Path) -> str:
    """What to do about a checkpoint that cannot be trusted."""
    run_folder = folder.parent.parent
    others = [step for step in steps(run_folder) if f"step_{step}" != folder.name]
    if others:
        return f"Move {folder} away to go on from step_{others[-1]}."
    return f"There is no other checkpoint: move {run_folder} away to start over."
