"""What an agent tells the rank that it starts, by environment: who owns the run folder, where beats and stacks go.

A rank without an agent is owned by nobody, and beats for nobody.
"""

import faulthandler
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from moe.errors import CheckpointError

OWNER = "TURNOUT_OWNER"
"""The attempt that this rank belongs to: `NUMBER TOKEN`, as it must stand in the run folder's launch/owner."""
BEAT = "TURNOUT_BEAT"
"""A file of this machine: the rank writes there how far it is."""
STACKS = "TURNOUT_STACKS"
"""A file of this machine: on SIGUSR2 the rank writes there what each of its threads does."""


def check_owner(run_folder: Path) -> None:
    """Call it before every write into a run folder.

    Raises `CheckpointError` if another attempt has taken the run over, so that a rank that was given up but lives
    (its machine was cut off, say) changes nothing.
    """
    mine = os.environ.get(OWNER)
    if mine is None:
        return
    path = run_folder / "launch" / "owner"
    try:
        owner = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}), so attempt {mine.split()[0]} cannot know whether "
            f"the run is still its own, and writes nothing. Launch the run again."
        ) from None
    if owner != mine:
        raise CheckpointError(
            f"{run_folder} belongs to attempt {owner.split()[0] if owner else '?'} by now, this is attempt "
            f"{mine.split()[0]}: it was given up, and writes nothing. Nothing to do."
        )


def still_owner(run_folder: Path) -> bool:
    """Whether `check_owner` would let this rank write."""
    try:
        check_owner(run_folder)
    except CheckpointError:
        return False
    return True


def beats(step: int, environment: Mapping[str, str] | None = None) -> Callable[[int], None]:
    """A function that notes a step as taken, and `step` noted; it costs a write of some bytes to memory."""
    environment = os.environ if environment is None else environment
    if BEAT not in environment:
        return lambda step: None
    descriptor = os.open(environment[BEAT], os.O_WRONLY | os.O_CREAT, 0o600)
    count = 0

    def beat(step: int) -> None:
        nonlocal count
        count += 1
        os.pwrite(descriptor, f"{step:>12d} {count:>12d}\n".encode(), 0)

    beat(step)
    return beat


def show_stacks_on_request(environment: Mapping[str, str] | None = None) -> None:
    """From now on SIGUSR2 makes this process write the stacks of its threads, also where Python is stuck in C."""
    environment = os.environ if environment is None else environment
    if STACKS in environment:
        file = Path(environment[STACKS]).open("w", encoding="utf-8")  # noqa: SIM115  open as long as we live
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
