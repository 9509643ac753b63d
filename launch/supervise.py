"""A plan in a run folder -> attempts until the run is done, is stopped, or is given up with a diagnosis.

    python -m launch.supervise RUN

`turnout launch` starts it: on this machine for local and hosts, as the batch script's program for Slurm. It counts
up the lease, judges the agents' reports, and starts anew what failed. Success is the run's `done` record, whatever
exit codes say.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from launch import start
from launch.folder import Attempt, LaunchFolder, NodeReport, Order, Plan, ended, write_text
from launch.slurm import Job
from launch.verdict import Verdict, culprit, judge
from moe import log
from moe.errors import EXIT_STOPPED, EXIT_USER_ERROR, LaunchError, clean_exit

_POLL_SECONDS = 0.25
_STACK_SECONDS = 2.0
_LEAVE_SECONDS = 5.0
EXIT_FAILED = 1


@dataclass
class _Watch:
    """What is seen of an attempt while it runs."""

    began: float = field(default_factory=time.monotonic)
    counts: dict[int, tuple[int, float]] = field(default_factory=dict)
    shown: int = 0

    def silent_seconds(self, reports: Sequence[NodeReport]) -> dict[int, float]:
        now = time.monotonic()
        for report in reports:
            if self.counts.get(report.node, (-1, 0.0))[0] != report.count:
                self.counts[report.node] = (report.count, now)
        return {node: now - since for node, (_, since) in self.counts.items()}


@dataclass
class Supervisor:
    """One launch of a run."""

    folder: LaunchFolder
    plan: Plan
    job: Job | None
    asked: str | None = None
    """The signal that asks us to save and leave."""
    bad: set[str] = field(default_factory=set)

    def run(self) -> int:
        """All attempts; the exit code of the command."""
        fruitless = 0
        while True:
            nodes = self._nodes()
            if nodes is None:
                return self._give_up_nodes()
            attempt = self._begin(nodes)
            attempt = self._attend(attempt)
            if attempt.outcome == "done":
                return self._close(attempt, "the run is complete", 0)
            if attempt.outcome == "saved":
                return self._leave(attempt)
            if attempt.outcome == "refused":
                sentence = "given up: the ranks refuse the run, and would again"
                return self._close(attempt, sentence, EXIT_USER_ERROR)
            fruitless = 0 if (attempt.to_step or 0) > attempt.from_step else fruitless + 1
            if fruitless >= self.plan.limits.fruitless_attempts:
                sentence = f"given up: {fruitless} attempts in a row without a new checkpoint"
                return self._close(attempt, sentence, EXIT_FAILED)
            if self.asked or self.folder.stop.exists():
                return self._close(attempt, "ended, as it was asked to", EXIT_FAILED)
            if attempt.outcome == "lost" and attempt.host is not None:
                self.bad.add(attempt.host)
            self._note(attempt, "started again")

    def listen(self) -> None:
        """USR1 comes from Slurm before the time limit; the others from Slurm, a shell or a person."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN or number is signal.SIGUSR1:
                signal.signal(number, self._ask)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number).name

    def _nodes(self) -> tuple[str, ...] | None:
        """Those to start on: the allocation's first that are not bad; None when too few are left."""
        if self.plan.kind == "local":
            return ("127.0.0.1",)
        given = self.job.nodes if self.job is not None else self.plan.hosts
        good = [node for node in given if node not in self.bad]
        return tuple(good[: self.plan.num_nodes]) if len(good) >= self.plan.num_nodes else None

    def _begin(self, nodes: tuple[str, ...]) -> Attempt:
        number = max((attempt.number for attempt in self.folder.attempts()), default=0) + 1
        attempt = Attempt(
            number=number,
            token=secrets.token_hex(8),
            nodes=nodes,
            began=time.time(),
            from_step=self.folder.newest_step(),
            job=None if self.job is None else self.job.number,
        )
        self.folder.attempt_folder(number).mkdir(parents=True)
        self.folder.logs(number).mkdir(parents=True, exist_ok=True)
        (self.folder.attempt_folder(number) / "lease").write_text("0\n", encoding="utf-8")
        self.folder.write_attempt(attempt)
        # From here on no rank of an earlier attempt writes.
        write_text(self.folder.owner, attempt.owner + "\n")
        if self.plan.pdsh:
            page = start.hostfile(attempt, self.plan.ranks_per_node)
            write_text(self.folder.home / "hostfile", page)
        log.get().info(
            "attempt %d: %d ranks on %s, from step %d; logs in %s",
            number,
            self.plan.world_size,
            ", ".join(nodes),
            attempt.from_step,
            self.folder.logs(number),
        )
        return attempt

    def _attend(self, attempt: Attempt) -> Attempt:
        """Start the agents and stay until they have ended; the attempt with its end."""
        done_before = _mark(self.folder.done)
        with (self.folder.logs(attempt.number) / "launcher.log").open("ab") as log_file:
            runners = [
                subprocess.Popen(
                    command,
                    cwd=self.plan.working_folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    start_new_session=True,  # Ctrl-C reaches us alone, and the ranks through the agents
                )
                for command in start.commands(self.folder, self.plan, attempt)
            ]
        try:
            verdict = self._watch(attempt, runners)
        finally:
            self._order(attempt, "end")
            reports = self._wait_for_agents(attempt, runners)
        _show(self.folder.log(attempt.number, 0), self._watching)
        steps = [rank.step for report in reports for rank in report.ranks if rank.step is not None]
        attempt = ended(
            attempt,
            ended=time.time(),
            to_step=self.folder.newest_step(),
            last_step=max(steps, default=None),
        )
        if (mark := _mark(self.folder.done)) is not None and (mark != done_before or _all(reports, 0)):
            return ended(attempt, outcome="done")
        if verdict is None:
            return ended(attempt, **self._quiet_end(attempt, reports))
        return ended(
            attempt, outcome=verdict.outcome, cause=verdict.cause, rank=verdict.rank, host=verdict.host
        )

    def _watch(self, attempt: Attempt, runners: Sequence["subprocess.Popen[bytes]"]) -> Verdict | None:
        """Until all agents have ended (None), or the attempt goes wrong."""
        self._watching = watching = _Watch()
        count, stopping_since = 0, None
        limits = self.plan.limits
        while True:
            time.sleep(_POLL_SECONDS)
            count += 1
            _overwrite(self.folder.attempt_folder(attempt.number) / "lease", count)
            reports = self.folder.reports(attempt.number)
            silent = watching.silent_seconds(reports)
            _show(self.folder.log(attempt.number, 0), watching)
            if len(reports) == self.plan.num_nodes and all(report.ended for report in reports):
                return judge(reports, {}, limits)
            verdict = judge(reports, silent, limits)
            now = time.monotonic()
            if verdict is not None and verdict.outcome == "hung":
                return self._examine(attempt, verdict)
            if verdict is not None:
                return verdict
            if len(reports) < self.plan.num_nodes:
                if all(runner.poll() is not None for runner in runners) and now - watching.began > 1.0:
                    return self._no_agent(attempt, reports)
                if now - watching.began > limits.boot_seconds:
                    return self._no_agent(attempt, reports)
            if self.asked is None:
                self.asked = next((report.asked for report in reports if report.asked), None)
            if stopping_since is None and (self.asked or self.folder.stop.exists()):
                why = self.asked or "turnout stop"
                log.get().info("asked to stop (%s): the ranks finish their step and save", why)
                self._order(attempt, "stop")
                stopping_since = now
            if stopping_since is not None and now - stopping_since > limits.save_seconds:
                return Verdict("hung", f"asked to save, the ranks did not within {limits.save_seconds:.0f} s")

    def _examine(self, attempt: Attempt, verdict: Verdict) -> Verdict:
        """Which rank hangs: ask all for their stacks, keep them, and find the one that differs."""
        self._order(attempt, "stacks")
        time.sleep(_STACK_SECONDS)
        reports = self.folder.reports(attempt.number)
        for report in reports:
            for rank in report.ranks:
                path = self.folder.logs(attempt.number) / f"rank_{rank.rank}.stack"
                write_text(path, rank.stack or "(it wrote no stack)\n")
        found = culprit(reports)
        return Verdict("hung", f"{verdict.cause}; {found.cause}", found.rank, found.host)

    def _no_agent(self, attempt: Attempt, reports: Sequence[NodeReport]) -> Verdict:
        said = {report.node for report in reports}
        node = next(node for node in range(self.plan.num_nodes) if node not in said)
        launcher = self.folder.logs(attempt.number) / "launcher.log"
        return Verdict("lost", f"no agent began on node {node}; see {launcher}", None, attempt.nodes[node])

    def _quiet_end(self, attempt: Attempt, reports: Sequence[NodeReport]) -> dict[str, str]:
        """All ranks left with 0 or 75, and there is no new `done` record."""
        if _all(reports, EXIT_STOPPED):
            why = self.asked or ("turnout stop" if self.folder.stop.exists() else "a signal to the ranks")
            return {"outcome": "saved", "cause": why}
        return {"outcome": "failed", "cause": "the ranks ended without a `done` record"}

    def _wait_for_agents(
        self, attempt: Attempt, runners: Sequence["subprocess.Popen[bytes]"]
    ) -> list[NodeReport]:
        """Give agents and launchers a moment, then end the launchers; agents that live on have lost their lease."""
        end = time.monotonic() + _LEAVE_SECONDS
        while any(runner.poll() is None for runner in runners) and time.monotonic() < end:
            time.sleep(0.05)
        for runner in runners:
            with suppress(ProcessLookupError):
                os.killpg(runner.pid, signal.SIGKILL)
            runner.wait()
        return self.folder.reports(attempt.number)

    def _order(self, attempt: Attempt, order: Order) -> None:
        write_text(self.folder.attempt_folder(attempt.number) / "order", order + "\n")

    def _leave(self, attempt: Attempt) -> int:
        """The ranks have saved because they were asked to."""
        if self.folder.stop.exists() or self.job is None:
            return self._close(attempt, "stopped; the same launch goes on from here", EXIT_STOPPED)
        if not self.job.is_running():
            return self._close(attempt, "left to Slurm, which ends or requeues the job", EXIT_STOPPED)
        return self._requeue(attempt)

    def _give_up_nodes(self) -> int:
        attempt = self.folder.attempts()[-1]
        if self.job is not None and self.job.is_running():
            return self._requeue(attempt, without=sorted(self.bad))
        sentence = f"given up: without {', '.join(sorted(self.bad))} there are too few nodes"
        return self._close(attempt, sentence, EXIT_FAILED)

    def _requeue(self, attempt: Attempt, without: Sequence[str] = ()) -> int:
        assert self.job is not None
        left_out = f" without {', '.join(without)}" if without else ""
        code = self._close(attempt, f"requeued{left_out}", EXIT_STOPPED)
        self.job.requeue(without)
        return code

    def _note(self, attempt: Attempt, then: str) -> None:
        self.folder.write_attempt(ended(attempt, then=then))
        where = f": rank {attempt.rank} on {attempt.host}" if attempt.rank is not None else ""
        cause = f" ({attempt.cause})" if attempt.cause else ""
        log.get().info("attempt %d: %s%s%s; %s", attempt.number, attempt.outcome, where, cause, then)

    def _close(self, attempt: Attempt, then: str, code: int) -> int:
        self._note(attempt, then)
        return code


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


def _show(path: Path, watching: _Watch) -> None:
    """Pass on what the first rank has said since."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(watching.shown)
        said = file.read()
        watching.shown += len(said)
        sys.stderr.write(said.decode(errors="replace"))
        sys.stderr.flush()


def supervise(run_folder: Path) -> int:
    """Attempts until the end. Raises `LaunchError`."""
    folder = LaunchFolder(run_folder)
    plan = folder.plan()
    job = Job.mine() if plan.kind == "slurm" else None
    supervisor = Supervisor(folder, plan, job)
    supervisor.listen()
    return supervisor.run()


def main() -> None:
    log.setup()
    with clean_exit():
        if len(sys.argv) != 2:
            raise LaunchError(
                "write python -m launch.supervise RUN, with the folder of a run that was launched."
            )
        sys.exit(supervise(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
