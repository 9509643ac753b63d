"""A folder that is complete or not there: written beside its place under a lock, synced, then renamed."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.util import register_after_fork
from pathlib import Path

from moe.data.shards import MANIFEST_NAME, Manifest
from moe.errors import DataError

_SYNCS = 16
"""Files brought to the disk at a time: many waits are hardly longer than one."""


def existing(folder: Path) -> Manifest | None:
    """What a preparation left in `folder`; null if it is absent or empty.

    Raises `DataError` if something else is there, which is never touched, or a manifest that cannot be read.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise DataError(f"{folder}: the output is to be a folder, but a file is there. Use another output.")
    if not any(folder.iterdir()):
        return None
    if not (folder / MANIFEST_NAME).is_file():
        raise DataError(
            f"{folder}: this folder is not empty and has no {MANIFEST_NAME}, so turnout did not make it and will "
            f"not touch it. Use another output."
        )
    try:
        return Manifest.read(folder)
    except DataError as error:
        raise DataError(
            f"{error} Nothing was touched: remove the folder yourself, or use another output."
        ) from None


@contextmanager
def errors_of_the_disk(folder: Path) -> Iterator[None]:
    """What reading and writing raise as `DataError`, with the file that it is about, or `folder`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: {error.strerror or error}. Check that it is there and its permissions."
        ) from None


@contextmanager
def workspace(folder: Path, *, replace: bool) -> Iterator[Path]:
    """An empty folder to write in, which becomes `folder` if the block ends well and vanishes if not.

    With `replace`, what an earlier preparation left in `folder` gives way at the very end.
    Raises `DataError`: another run is at work on `folder`, something else is in it, or the disk refuses.
    """
    place = folder.resolve()
    if not place.name:
        raise DataError(f"{folder}: the output is the root of all folders. Use another output.")
    unfinished = place.with_name(f".{place.name}.unfinished")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place):
            occupied = existing(folder) is not None
            if occupied and not replace:
                raise DataError(
                    f"{folder}: another run has just filled it. Use another output, or --overwrite."
                )
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed: we hold the lock
            unfinished.mkdir()
            try:
                yield unfinished
                sync(unfinished)
                _publish(unfinished, place)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{folder}: writing failed ({error.strerror or error}); nothing was left behind. "
            f"Check the disk and its permissions, then run the same command again."
        ) from None


def _publish(unfinished: Path, place: Path) -> None:
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists() and any(place.iterdir()):
        place.rename(old)
    unfinished.rename(place)
    _sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold `place` against other runs; raises `DataError` if one holds it."""
    path = place.with_name(f".{place.name}.lock")
    with path.open("w") as file:
        register_after_fork(
            file, lambda held: held.close()
        )  # or workers would hold the place when we are killed
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False  # another run holds it, or has just removed it
        if not held:
            raise DataError(f"{place}: another run is preparing this folder. Wait for it, or stop it.")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Bring a folder and all in it to the disk."""
    paths = sorted(folder.rglob("*"))
    with ThreadPoolExecutor(_SYNCS) as threads:
        list(threads.map(_sync, (path for path in paths if path.is_file())))
    for path in paths:
        if not path.is_file():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
