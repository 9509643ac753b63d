"""What the agents report -> whether an attempt is over, and which rank on which host went wrong first. Pure."""

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.folder import Limits, NodeReport, RankReport
from moe.attempt import WAITING
from moe.errors import EXIT_STOPPED, EXIT_USER_ERROR

_TOP_FRAMES = 4


@dataclass(frozen=True)
class Verdict:
    """How an attempt goes wrong."""

    outcome: str
    """failed, refused, hung, lost or unstarted."""
    cause: str
    rank: int | None = None
    host: str | None = None


def judge(
    reports: Sequence[NodeReport],
    silent_seconds: Mapping[int, float],
    limits: Limits,
    *,
    stopping: bool = False,
) -> Verdict | None:
    """None while all goes well. `silent_seconds`: for how long each node's agent has said nothing new.

    Ranks that were asked to stop (`stopping`) take no more steps: they save and leave, which is no hang.
    """
    dead = [
        (rank, report)
        for report in reports
        for rank in report.ranks
        if rank.code not in (None, 0, EXIT_STOPPED) and not rank.killed
    ]
    if dead:
        return _first_failure(dead)
    for report in reports:
        if not report.ended and silent_seconds.get(report.node, 0.0) > limits.lease_seconds:
            return Verdict(
                "lost",
                f"node {report.host} has not been heard of for {limits.lease_seconds:.0f} s",
                report.ranks[0].rank if report.ranks else None,
                report.host,
            )
    alive = [rank for report in reports for rank in report.ranks if rank.code is None]
    if alive:
        booting = any(rank.beats == 0 for rank in alive)
        step = max(limits.hang_seconds, limits.save_seconds) if stopping else limits.hang_seconds
        limit = limits.boot_seconds if booting else step
        still = min(rank.still_seconds for rank in alive)
        if (booting or stopping) and (
            verdict := _halted(reports, limits.hang_seconds, "boot" if booting else "end")
        ):
            return verdict
        if still > limit:
            what = "has begun" if booting else "took a step"
            return Verdict("hung", f"no rank {what} for {still:.0f} s (the limit is {limit:.0f} s)")
    return None


def _halted(reports: Sequence[NodeReport], limit: float, when: str) -> Verdict | None:
    """While ranks boot, or save and leave, they take no steps, but one that is halted by a signal does nothing at all.

    A rank that a debugger holds is looked at by somebody, and may boot for as long as any. When a whole job is
    suspended its agents are too, and count nothing.
    """
    halted = [(rank, report) for report in reports for rank in report.ranks if rank.halted_seconds > limit]
    if not halted:
        return None
    rank, report = max(halted, key=lambda pair: pair[0].halted_seconds)
    cause = f"it was halted by a signal (SIGSTOP) in its {when}, {rank.halted_seconds:.0f} s ago"
    return Verdict("hung", f"{cause} (the limit is {limit:.0f} s)", rank.rank, report.host)


def culprit(reports: Sequence[NodeReport]) -> Verdict:
    """Of a hung attempt, whose agents were asked for stacks: the rank that the others wait for."""
    alive = [(rank, report) for report in reports for rank in report.ranks if rank.code is None]
    for rank, report in alive:
        if rank.stopped:
            return Verdict("hung", "it is halted by a signal (SIGSTOP) or a debugger", rank.rank, report.host)
    mute = [(rank, report) for rank, report in alive if not rank.stack]
    if mute and len(mute) < len(alive):
        rank, report = mute[0]
        return Verdict("hung", "it does not say where it is, while others do", rank.rank, report.host)
    busy = [(rank, report) for rank, report in alive if rank.stack and not _waits(rank.stack)]
    if busy and len(busy) < len(alive):
        rank, report = busy[0]
        where = _where(rank.stack or "")
        others = len(alive) - len(busy)
        return Verdict("hung", f"it is in {where} while {others} others wait for it", rank.rank, report.host)
    if not alive:
        return Verdict("hung", "no rank lives")
    rank, report = min(alive, key=lambda pair: (pair[0].step or 0, -pair[0].still_seconds))
    return Verdict("hung", f"it stands in {_where(rank.stack or '')}, as all do", rank.rank, report.host)


def unlost(lost: Verdict, srun: int | None, said: str) -> Verdict:
    """Of a node that is silent: whether srun tells of another cause than the node.

    `srun`: its exit code, None while it lives; `said`: its messages. It takes all agents with it when it is killed, and
    lives as long as any of them.
    """
    if srun is not None and srun < 0:
        return Verdict("failed", f"srun, which holds the agents, was ended by {_signal_name(-srun)}")
    if lost.host is not None and re.search(
        rf"^srun: error: {re.escape(lost.host)}: task \d+: Killed", said, re.MULTILINE
    ):
        return Verdict("failed", "the agent was ended by SIGKILL", None, lost.host)
    return lost


def _first_failure(dead: Sequence[tuple[RankReport, NodeReport]]) -> Verdict:
    """A rank ended by a signal comes before those that complain of a lost peer; else the longest dead."""
    rank, report = min(dead, key=lambda pair: ((pair[0].code or 0) > 0, -pair[0].seconds_dead))
    code = rank.code or 0
    cause = f"ended by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
    outcome = "refused" if code == EXIT_USER_ERROR else "failed"
    return Verdict(outcome, cause, rank.rank, report.host)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _threads(stack: str) -> list[list[tuple[str, str]]]:
    """Of each thread its frames, innermost first, as (place, function)."""
    threads = []
    for block in re.split(r"^(?:Current thread|Thread) .*$", stack, flags=re.MULTILINE):
        frames = re.findall(r'^  File "(.+)", line (\d+) in (.+)$', block, flags=re.MULTILINE)
        if frames:
            threads.append([(f"{file}:{line}", name) for file, line, name in frames])
    return threads


def _waits(stack: str) -> bool:
    """Whether some thread stands in a collective."""
    return any(
        part in place for frames in _threads(stack) for place, _ in frames[:_TOP_FRAMES] for part in WAITING
    )


def _where(stack: str) -> str:
    """The innermost frame of the main thread, which faulthandler writes last."""
    threads = _threads(stack)
    if not threads:
        return "a place that it does not say"
    place, name = threads[-1][0]
    return f"{name} ({place})"
