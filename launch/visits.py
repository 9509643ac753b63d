"""Hosts -> a probe on each, asked all at once; a host that stays silent far longer than the others is given up."""

import json
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from launch.probe import ANSWER

_LIMIT_SECONDS = 60.0
_PATIENCE_SECONDS = 5.0
"""After most hosts have answered; or as long again as these took, if that was longer."""
_POLL_SECONDS = 0.005
_LEAVE_SECONDS = 2.0


@dataclass(frozen=True)
class Fault:
    """Why there is no answer."""

    what: str


@dataclass
class Visit:
    """A probe on one host."""

    host: str
    process: "subprocess.Popen[str]"
    errors: Any
    lines: "queue.Queue[str | None]" = field(default_factory=queue.Queue)

    @classmethod
    def begin(cls, host: str, command: Sequence[str]) -> "Visit":
        """`command` starts `launch.probe` there."""
        errors = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process; a pipe could fill
        pipe = subprocess.PIPE
        process = subprocess.Popen(list(command), text=True, stdin=pipe, stdout=pipe, stderr=errors)
        visit = cls(host, process, errors)
        threading.Thread(target=visit._read, daemon=True).start()
        return visit

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                self.lines.put(line.removeprefix(ANSWER))
        self.lines.put(None)

    def say(self, question: str, given: Mapping[str, Any]) -> None:
        """Ask; nothing happens if nobody is there."""
        assert self.process.stdin is not None
        with suppress(OSError):  # the end of its output says it
            self.process.stdin.write(json.dumps([question, given]) + "\n")
            self.process.stdin.flush()

    def hear(self, seconds: float) -> Any:
        """The next answer, a `Fault`, or None if there is none yet."""
        try:
            line = self.lines.get(timeout=seconds) if seconds else self.lines.get_nowait()
        except queue.Empty:
            return None
        if line is None:
            self.lines.put(None)
            return Fault(f"it does not answer: {self._last_word()}")
        answer = json.loads(line)
        return Fault(answer["fault"]) if "fault" in answer else answer["said"]

    def _last_word(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with code {self.process.returncode}"

    def dismiss(self) -> None:
        """Let it end by itself."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()

    def end(self) -> None:
        """Gone when this returns."""
        self.dismiss()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_LEAVE_SECONDS)
        self.process.kill()
        self.process.wait()
        self.errors.close()


def ask(
    visits: Sequence[Visit], question: str, given: Callable[[int], Mapping[str, Any]] = lambda _: {}
) -> dict[str, Any]:
    """By host what it says, or a `Fault`. `given`: a visit's number, from 0 -> what that one is told."""
    for number, visit in enumerate(visits):
        visit.say(question, given(number))
    began = time.monotonic()
    end = began + _LIMIT_SECONDS
    heard: dict[str, Any] = {}
    most: float | None = None
    while len(heard) < len(visits) and time.monotonic() < end:
        for visit in visits:
            if visit.host not in heard and (answer := visit.hear(0)) is not None:
                heard[visit.host] = answer
        now = time.monotonic()
        if most is None and 2 * len(heard) >= len(visits):
            most = now
            end = min(end, most + max(_PATIENCE_SECONDS, most - began))
        time.sleep(_POLL_SECONDS)
    late = Fault(f"it does not answer within {time.monotonic() - began:.0f} s")
    return {visit.host: heard.get(visit.host, late) for visit in visits}


def clock(visit: Visit) -> tuple[float, float] | Fault:
    """How many seconds its clock is ahead of ours, and how sure that is."""
    asked = time.time()
    visit.say("now", {})
    theirs = visit.hear(_PATIENCE_SECONDS)
    here = time.time()
    if theirs is None or isinstance(theirs, Fault):
        return theirs or Fault(f"it does not answer within {_PATIENCE_SECONDS:.0f} s")
    return theirs - (asked + here) / 2, (here - asked) / 2
