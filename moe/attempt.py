"""What an agent tells the rank that it starts, by environment: who owns the run folder, where beats and stacks go.

A rank without an agent is owned by nobody, and beats for nobody.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from moe.errors import CheckpointError

OWNER = "TURNOUT_OWNER"
"""The attempt that this rank belongs to: `NUMBER TOKEN`, as it must stand in the run folder's launch/owner."""
BEAT = "TURNOUT_BEAT"
"""A file of this machine: the rank writes there how far it is."""
STACKS = "TURNOUT_STACKS"
"""A file of this machine: on SIGUSR2 the rank writes there what each of its threads does."""

WAITING = ("torch/distributed/", "deepspeed/comm/", "moe/sparse/collectives.py")
"""Parts of the paths of the files in which a thread waits for other ranks."""
_INNERMOST = 4
_SAMPLE_SECONDS = 0.05
_LATE = 1.5
_HALF_LIFE_SECONDS = 60.0


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
    pace = Pace()

    def beat(step: int) -> None:
        pace.count += 1
        works, waits = pace.by_step
        os.pwrite(descriptor, f"{step:>12d} {pace.count:>12d} {works:>14.4f} {waits:>14.4f}\n".encode(), 0)

    beat(step)
    threading.Thread(target=pace.sample_for_ever, daemon=True).start()
    return beat


class Pace:
    """How long the main thread works in a step, and how long it waits for other ranks.

    In step with its peers every rank takes the same time for a step; the one that holds them up is the one that waits
    least. A thread looks 20 times a second where the main thread stands, so that no step has to be timed, and no
    device waited for. On a GPU that is the host's side alone. The last minute or two count.
    """

    def __init__(self) -> None:
        self.count = 0
        """Of beats; the first is no step."""
        self.by_step = (0.0, 0.0)
        self._steps, self._works, self._waits, self._seen = 0.0, 0.0, 0.0, 1

    def sample_for_ever(self) -> None:
        """For a thread of its own."""
        main, last = threading.main_thread().ident, time.perf_counter()
        while True:
            time.sleep(_SAMPLE_SECONDS)
            now = time.perf_counter()
            self.sample(sys._current_frames().get(main or 0), now - last)
            last = now

    def sample(self, frame: FrameType | None, seconds: float) -> None:
        """The main thread stands in `frame`, `seconds` after the last sample."""
        keep, waits = 0.5 ** (seconds / _HALF_LIFE_SECONDS), _waits(frame)
        # A process that is late to look was not let run: halted, or short of cores. Its peers waited for it meanwhile.
        late = max(0.0, seconds - _LATE * _SAMPLE_SECONDS)
        self._works = self._works * keep + (late if waits else seconds)
        self._waits = self._waits * keep + (seconds - late if waits else 0.0)
        self._steps = self._steps * keep + max(0, self.count - self._seen)
        self._seen = max(self.count, self._seen)
        if self._steps:
            self.by_step = (self._works / self._steps, self._waits / self._steps)


def _waits(frame: FrameType | None) -> bool:
    for _ in range(_INNERMOST):
        if frame is None:
            return False
        if any(part in frame.f_code.co_filename for part in WAITING):
            return True
        frame = frame.f_back
    return False


def show_stacks_on_request(environment: Mapping[str, str] | None = None) -> None:
    """From now on SIGUSR2 makes this process write the stacks of its threads, also where Python is stuck in C."""
    environment = os.environ if environment is None else environment
    if STACKS in environment:
        file = Path(environment[STACKS]).open("w", encoding="utf-8")  # noqa: SIM115  open as long as we live
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
