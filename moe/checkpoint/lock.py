"""One run folder, one writer."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe.attempt import OWNER, check_owner
from moe.errors import CheckpointError

_SECONDS = 120.0


@contextmanager
def held(run_folder: Path) -> Iterator[None]:
    """Hold the folder's lock (flock on .lock, made if need be) while training writes there.

    Raises `CheckpointError` if another process holds it; the system lets go when its holder ends, however. An
    attempt of `turnout launch` waits for that: the holder is an earlier one, on a machine that was given up. Raises
    as well if this attempt is itself no longer the owner.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    with (run_folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            _take(file.fileno(), _SECONDS if OWNER in os.environ else 0.0)
        except BlockingIOError:
            file.seek(0)
            raise CheckpointError(
                f"{run_folder} is in use: {file.read().strip() or 'another process'} trains there. "
                f"Wait for its end, end it, or choose another run_dir."
            ) from None
        check_owner(run_folder)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _take(descriptor: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.1)
