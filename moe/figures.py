"""What a command found -> the file that its --json names, whole or not at all."""

import os
from pathlib import Path

from moe.errors import ConfigError


def check_place(path: Path) -> None:
    """Before minutes of work: can a file be written here? Raises `ConfigError`."""
    try:
        if path.is_dir():
            raise ConfigError(f"--json is {path}, which is a folder: give the path of a file in it.")
        if (trial := _written_first(path)) != path:
            trial.touch()
            trial.unlink()
    except OSError as error:
        raise ConfigError(
            f"--json is {path}, which cannot be written ({error.strerror}). "
            f"Give the path of a file in a folder that exists."
        ) from None


def write(path: Path, text: str) -> None:
    """Raises `ConfigError`: no space, no permission any more."""
    first = _written_first(path)
    try:
        first.write_text(text, encoding="utf-8")
        if first != path:
            first.replace(path.resolve())
    except OSError as error:
        if first != path:
            first.unlink(missing_ok=True)
        raise ConfigError(
            f"--json is {path}, which cannot be written ({error.strerror}); the figures are above. "
            f"Mend that, or give another path."
        ) from None


def _written_first(path: Path) -> Path:
    """A file beside `path`, to be renamed to it; a pipe or a device is written as it is."""
    if path.exists() and not path.is_file():
        return path
    return path.resolve().with_name(f".turnout-{os.getpid()}.tmp")
