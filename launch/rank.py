"""A training process of this node -> how it does: its beats, its death, its stack; and what is asked of it."""

import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch import procfs
from launch.awake import Awake
from launch.folder import RankReport


@dataclass
class Rank:
    """A process of ours, and what we know of it."""

    rank: int
    process: "subprocess.Popen[bytes]"
    beat: Path
    stacks: Path
    clock: Awake
    last_beat: float
    step: int | None = None
    beats: int = 0
    works: float = 0.0
    waits: float = 0.0
    died: float | None = None
    killed: bool = False
    """By us, while it lived."""
    told: bool = False
    asked_for_stack: bool = False
    halted: float | None = None
    """Since when it has been halted by a signal."""

    def look(self) -> None:
        """Read its beat, and whether it lives."""
        now = self.clock.seconds()
        with suppress(OSError, ValueError):
            numbers = self.beat.read_text().split()
            step, beats = (int(number) for number in numbers[:2])
            self.works, self.waits = (float(number) for number in numbers[2:])
            if beats != self.beats:
                self.step, self.beats, self.last_beat = step, beats, now
        if self.died is None and self.process.poll() is not None:
            self.died = now
        if not self._state().startswith("T"):
            self.halted = None
        elif self.halted is None:
            self.halted = now

    def _state(self) -> str:
        """As the kernel has it: T halted by a signal, t by a debugger."""
        return "" if self.died is not None else procfs.status(self.process.pid, "State:")

    def report(self) -> RankReport:
        """What was seen last, for the supervisor."""
        now = self.clock.seconds()
        stack = None
        if self.asked_for_stack:
            with suppress(OSError):
                stack = self.stacks.read_text(errors="replace")[-20_000:]
        return RankReport(
            rank=self.rank,
            pid=self.process.pid,
            step=self.step,
            beats=self.beats,
            works=self.works,
            waits=self.waits,
            still_seconds=round(now - self.last_beat, 1),
            code=self.process.returncode,
            seconds_dead=0.0 if self.died is None else round(now - self.died, 2),
            killed=self.killed,
            stopped=self._state().startswith(("T", "t")),
            halted_seconds=0.0 if self.halted is None else round(now - self.halted, 1),
            stack=stack,
        )

    def ask_to_stop(self) -> None:
        """Once it can hear it: earlier, SIGTERM would end it unsaved, and its peers with it."""
        if not self.told and self.died is None and procfs.catches(self.process.pid, signal.SIGTERM):
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
            self.told = True

    def ask_for_stack(self) -> None:
        """Once, when it can hear it."""
        if (
            not self.asked_for_stack
            and self.died is None
            and procfs.catches(self.process.pid, signal.SIGUSR2)
        ):
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGUSR2)
            self.asked_for_stack = True

    def end(self) -> None:
        """Kill it and what it started; its session is its own."""
        self.killed = self.process.poll() is None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.look()
