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
    bad = Works(how, 0.5 if how in ("killed", "exits 0") else 0.0)
    return [
        Unit(folder / "stage", f"{n:05d}", "key", bad if n == BAD else Works("well", seconds))
        for n in range(count)
    ]


def main(how: str, folder: Path, config: str, doubt_seconds: float) -> None:
    """Run units on an executor, as a command does.

    `doubt_seconds` are given to a record to be seen, and to a task to begin yet.
    """
    from data_prep import executors, on_slurm
    from data_prep.recipe import DataRecipe
    from moe import log, recipe
    from moe.errors import clean_exit

    log.setup()
    on_slurm._DOUBT_SECONDS = on_slurm._NEVER_SECONDS = doubt_seconds
    with clean_exit():
        sound = "{name: x, sources: [{type: stdlib}], tokenizer: {type: bpe, vocab_size: 300}}"
        page = recipe.parse(DataRecipe, sound, [f"executor={config}"], source="test")
        with executors.workers(page.executor) as at_work:
            executors.run(units(folder, how), at_work)


if __name__ == "__main__":
    # By its full name, or the workers would look for the class in their own main module.
    from tests.unit import failing

    failing.main(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3], float(sys.argv[4]))
