"""One attempt: start its agents, count up its lease, judge what they report, and stay until they have ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from launch import start
from launch.awake import Awake
from launch.folder import Attempt, LaunchFolder, NodeReport, Order, Plan, ended, write_text
from launch.verdict import Verdict, culprit, judge, unlost
from moe import log
from moe.errors import EXIT_STOPPED

_POLL_SECONDS = 0.25
_STACK_SECONDS = 3.0
_SETTLE_SECONDS = 0.2
_LEAVE_SECONDS = 5.0
Runners = Sequence["subprocess.Popen[bytes]"]


@dataclass
class Attendance:
    """What is seen of an attempt while it runs."""

    folder: LaunchFolder
    plan: Plan
    attempt: Attempt
    asked: Callable[[], str | None]
    """The signal, if any, that asks us to let the ranks save and leave."""
    clock: Awake = field(default_factory=Awake)
    counts: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Of each node what it last counted, and since when."""
    shown: int = 0
    """Bytes of the first rank's log."""

    def attend(self) -> Attempt:
        """The attempt with its end."""
        done_before = _mark(self.folder.done)
        with self._launcher_log.open("ab") as log_file:
            runners = [
                subprocess.Popen(
                    command,
                    cwd=self.plan.working_folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    start_new_session=True,  # Ctrl-C reaches us alone, and the ranks through the agents
                )
                for command in start.commands(self.folder, self.plan, self.attempt)
            ]
        verdict = None
        try:
            verdict = self._watch(runners)
        finally:
            self._order("end")
            self._leave(runners, verdict.host if verdict is not None and verdict.outcome == "lost" else None)
        self._show()
        reports = self.folder.reports(self.attempt.number)
        if verdict is not None and verdict.outcome in ("failed", "refused") and verdict.rank is not None:
            # A rank dies of its peer's end at once, and its agent may say so before the peer's does.
            verdict = judge(reports, {}, self.plan.limits) or verdict
        attempt = ended(
            self.attempt,
            ended=time.time(),
            to_step=self.folder.newest_step(),
            last_step=self.folder.last_step(self.attempt.number),
        )
        if (mark := _mark(self.folder.done)) is not None and (mark != done_before or _all(reports, 0)):
            return ended(attempt, outcome="done")
        if verdict is None:
            return ended(attempt, **self._quiet_end(reports))
        return ended(
            attempt, outcome=verdict.outcome, cause=verdict.cause, rank=verdict.rank, host=verdict.host
        )

    def _watch(self, runners: Runners) -> Verdict | None:
        """Until all agents have ended (None), or the attempt goes wrong."""
        count, stopping_since = 0, None
        limits, number = self.plan.limits, self.attempt.number
        while True:
            time.sleep(_POLL_SECONDS)
            count += 1
            _overwrite(self.folder.attempt_folder(number) / "lease", count)
            reports = self.folder.reports(number)
            silent = self._silent_seconds(reports)
            self._show()
            if len(reports) == self.plan.num_nodes and all(report.ended for report in reports):
                return judge(reports, {}, limits)
            verdict = judge(reports, silent, limits, stopping=stopping_since is not None)
            if verdict is not None and verdict.outcome == "hung":
                return self._examine(verdict)
            if verdict is not None:
                return self._doubt(verdict, runners) if verdict.outcome == "lost" else verdict
            now = self.clock.seconds()
            if len(reports) < self.plan.num_nodes and (
                now > limits.agent_seconds
                or (now > 1.0 and all(runner.poll() is not None for runner in runners))
            ):
                return self._no_agent(reports)
            if stopping_since is None and (why := self._asked(reports)):
                log.get().info("asked to stop (%s): the ranks finish their step and save", why)
                self._order("stop")
                stopping_since = now
            if stopping_since is not None and now - stopping_since > limits.save_seconds:
                return Verdict("hung", f"asked to save, the ranks did not within {limits.save_seconds:.0f} s")

    def _asked(self, reports: Sequence[NodeReport]) -> str | None:
        """Who wants the ranks to save and leave: a signal to us or to an agent, or a person."""
        signals = [self.asked(), *(report.asked for report in reports)]
        person = "turnout stop" if self.folder.stop.exists() else None
        return next((name for name in signals if name), person)

    def _silent_seconds(self, reports: Sequence[NodeReport]) -> dict[int, float]:
        now = self.clock.seconds()
        for report in reports:
            if self.counts.get(report.node, (-1, 0.0))[0] != report.count:
                self.counts[report.node] = (report.count, now)
        return {node: now - since for node, (_, since) in self.counts.items()}

    def _examine(self, verdict: Verdict) -> Verdict:
        """Which rank hangs: ask all for their stacks, keep them, and find the one that differs."""
        self._order("stacks")
        end = self.clock.seconds() + _STACK_SECONDS
        while self.clock.seconds() < end and not _all_answered(self.folder.reports(self.attempt.number)):
            time.sleep(_SETTLE_SECONDS)
        time.sleep(_SETTLE_SECONDS)  # a stack that is being written is read again
        reports = self.folder.reports(self.attempt.number)
        for report in reports:
            for rank in report.ranks:
                path = self.folder.logs(self.attempt.number) / f"rank_{rank.rank}.stack"
                write_text(path, rank.stack or "(it wrote no stack)\n")
        if verdict.rank is not None:
            return verdict
        found = culprit(reports)
        return Verdict("hung", f"{verdict.cause}; {found.cause}", found.rank, found.host)

    def _doubt(self, lost: Verdict, runners: Runners) -> Verdict:
        """A node is silent, too, if its agent was killed, or srun and all agents with it."""
        if self.plan.kind != "slurm":
            return lost
        said = self._launcher_log.read_text(encoding="utf-8", errors="replace")
        return unlost(lost, runners[0].poll(), said)

    @property
    def _launcher_log(self) -> Path:
        return self.folder.logs(self.attempt.number) / "launcher.log"

    def _no_agent(self, reports: Sequence[NodeReport]) -> Verdict:
        """A node is lost if others have begun; else it is the launcher that failed, and no node is to blame."""
        said = {report.node for report in reports}
        node = next(node for node in range(self.plan.num_nodes) if node not in said)
        launcher = self._launcher_log
        if not said:
            words = launcher.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return Verdict(
                "unstarted", f"no agent began: {words[-1] if words else 'no word'}; see {launcher}"
            )
        return Verdict(
            "lost", f"no agent began on node {node}; see {launcher}", None, self.attempt.nodes[node]
        )

    def _quiet_end(self, reports: Sequence[NodeReport]) -> dict[str, str]:
        """All ranks left with 0 or 75, and there is no new `done` record."""
        if _all(reports, EXIT_STOPPED):
            return {"outcome": "saved", "cause": self._asked(reports) or "a signal to the ranks"}
        return {"outcome": "failed", "cause": "the ranks ended without a `done` record"}

    def _leave(self, runners: Runners, lost: str | None) -> None:
        """Give agents and launchers a moment, then end the launchers; agents that live on have lost their lease.

        A launcher may wait long for a lost node: then agents on the others are all that is waited for.
        """
        end = self.clock.seconds() + _LEAVE_SECONDS
        while any(runner.poll() is None for runner in runners) and self.clock.seconds() < end:
            reports = self.folder.reports(self.attempt.number)
            if lost is not None and all(report.ended for report in reports if report.host != lost):
                break
            time.sleep(0.05)
        for runner in runners:
            with suppress(ProcessLookupError):
                os.killpg(runner.pid, signal.SIGKILL)
            runner.wait()

    def _order(self, order: Order) -> None:
        write_text(self.folder.attempt_folder(self.attempt.number) / "order", order + "\n")

    def _show(self) -> None:
        """Pass on what the first rank has said since."""
        with suppress(OSError), self.folder.log(self.attempt.number, 0).open("rb") as file:
            file.seek(self.shown)
            said = file.read()
            self.shown += len(said)
            sys.stderr.write(said.decode(errors="replace"))
            sys.stderr.flush()


def _all_answered(reports: Sequence[NodeReport]) -> bool:
    """Whether every rank that can has shown its stack."""
    alive = [rank for report in reports for rank in report.ranks if rank.code is None]
    return all(rank.stack or rank.stopped for rank in alive)


def _all(reports: Sequence[NodeReport], code: int) -> bool:
    codes = {rank.code for report in reports for rank in report.ranks}
    return codes == {code}


def _mark(path: Path) -> tuple[int, int] | None:
    """Of a file; another when it is written anew."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _overwrite(path: Path, count: int) -> None:
    """In place: a new file of the same name would show late on NFS."""
    with suppress(OSError), path.open("r+", encoding="utf-8") as file:
        file.write(f"{count}\n")
