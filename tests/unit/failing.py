"""Units of work that end badly in every way we know of, for every executor."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data_prep.records import Facts, Unit
from moe.errors import DataError

BAD = 3
"""Number of the unit that fails."""


@dataclass(frozen=True)
class Works:
    """Leaves a file; `how` says what happens then, `seconds` how long it takes."""

    how: str = "well"
    seconds: float = 0.0

    def __call__(self, folder: Path) -> Facts:
        (folder / "half").write_text("half")
        time.sleep(self.seconds)
        match self.how:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "refused":
                raise DataError("this text cannot be read.")
            case "raises":
                raise ValueError("a fault of ours")
            case "disk full":
                raise OSError(28, "No space left on device", "somewhere")
            case "says it is done":
                sys.exit(0)
            case "exits 0":
                os._exit(0)
            case "hangs":
                while True:
                    time.sleep(0.01)
        return {}


def units(folder: Path, how: str, count: int = 5, seconds: float = 0.0) -> list[Unit]:
    """Of a stage in `folder`; number `BAD` fails."""
    return [
        Unit(folder / "stage", f"{n:05d}", "key", Works(how, 0.5) if n == BAD else Works("well", seconds))
        for n in range(count)
    ]
