"""One launcher on this machine and the ranks below it: start, stop kindly, end; all by pid."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch import procfs
from moe.orphans import die_with_parent

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 2.0


@dataclass(frozen=True)
class Outcome:
    code: int
    """The launcher's exit code; negative: the signal that ended it."""
    stops: int
    """How many times we were asked to stop."""


def run(
    command: Sequence[str],
    env: Mapping[str, str],
    is_rank: Callable[[Sequence[str]], bool],
    on_stop: Callable[[], None],
) -> Outcome:
    """Start `command` and wait for it; `is_rank` knows a rank by its command line.

    The first SIGTERM, SIGINT or SIGHUP calls `on_stop` and reaches every rank once; the second ends
    what is left. No process started here outlives the call.
    """
    with _stop_requests() as stops:
        # In a session of its own, Ctrl-C reaches us alone: we tell the ranks, and spare the launcher, which
        # would end them unsaved.
        launcher = subprocess.Popen(
            list(command), env=dict(env), start_new_session=True, preexec_fn=_end_with_parent
        )
        told: set[int] = set()
        grace, spoken = 0.0, False
        try:
            while len(stops) < 2:
                with suppress(subprocess.TimeoutExpired):
                    launcher.wait(_POLL_SECONDS)
                    grace = _GRACE_SECONDS
                    break
                if stops and not spoken:
                    on_stop()
                    spoken = True
                if stops:
                    told |= _tell(launcher.pid, is_rank, told)
        finally:
            launcher.kill()  # nothing happens if it has ended
            code = launcher.wait()
            _end(launcher.pid, grace)
        return Outcome(code, len(stops))


def _end_with_parent() -> None:
    """Ask the kernel to send SIGTERM when we are killed ourselves: the launcher then ends its ranks, which save."""
    die_with_parent(signal.SIGTERM)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that grows by each signal that asks us to stop."""
    received: list[int] = []
    wanted = [number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if not _ignored(number)]
    before = {number: signal.signal(number, lambda signum, _: received.append(signum)) for number in wanted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN  # nohup


def _tell(session: int, is_rank: Callable[[Sequence[str]], bool], told: set[int]) -> set[int]:
    """Send SIGTERM to the ranks that can hear it and have not been told; their pids."""
    ready = {pid for pid in _ranks(session, is_rank) - told if _catches_sigterm(pid)}
    for pid in ready:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    return ready


def _ranks(launcher: int, is_rank: Callable[[Sequence[str]], bool]) -> set[int]:
    """The launcher's own children, not theirs: a forked worker has its rank's command line."""
    found = set()
    with suppress(psutil.Error):
        for child in psutil.Process(launcher).children():
            with suppress(psutil.Error):
                if is_rank(child.cmdline()):
                    found.add(child.pid)
    return found


def _catches_sigterm(pid: int) -> bool:
    """Whether the process has a handler by now; elsewhere than on Linux we cannot know."""
    return not Path("/proc/self/status").exists() or procfs.catches(pid, signal.SIGTERM)


def _end(session: int, grace: float) -> None:
    """Kill what is left of the session after `grace` seconds."""
    psutil.wait_procs(_members(session), timeout=grace)
    while alive := _members(session):  # also what was forked meanwhile
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=_GRACE_SECONDS)


def _members(session: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members
