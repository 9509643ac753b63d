"""A plan in a run folder -> attempts until the run is done, is stopped, or is given up with a diagnosis.

    python -m launch.supervise RUN

`turnout launch` starts it: on this machine for local and hosts, as the batch script's program for Slurm. What failed
is started anew: in the same allocation, with a spare node for a lost one, or by a job without that node. Success
is the run's `done` record, whatever exit codes say.
"""

import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from launch import start
from launch.attend import Attendance
from launch.folder import Attempt, LaunchFolder, Plan, ended, fruitless, write, write_text
from launch.notice import Notice
from launch.slurm import Job
from moe import log
from moe.errors import EXIT_STOPPED, EXIT_USER_ERROR, LaunchError, clean_exit

EXIT_FAILED = 1
_PAUSE_SECONDS = 10.0


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
        self._abandon()
        with Notice.watching(None if self.job is None else self.job.notice) as notice:
            return self._run(lambda: self.asked or notice.why)

    def _run(self, asked: Callable[[], str | None]) -> int:
        while (nodes := self._nodes()) is not None:
            attempt = self._begin(nodes)
            attempt = Attendance(self.folder, self.plan.sized(attempt), attempt, asked).attend()
            if attempt.outcome == "done":
                return self._close(attempt, "the run is complete", 0)
            if attempt.outcome == "lost" and attempt.host is not None:
                self.bad.add(attempt.host)
            if attempt.outcome == "saved" or asked() or self.folder.stop.exists():
                return self._leave(attempt)
            if attempt.outcome == "refused":
                return self._close(attempt, "given up: the ranks would refuse it again", EXIT_USER_ERROR)
            unstarted = attempt.outcome == "unstarted"
            before = self.folder.attempts()[self.plan.first_attempt - 1 : -1]
            count = fruitless([*before, attempt])
            give_up = count >= self.plan.limits.fruitless_attempts
            if (unstarted or give_up) and self._is_taken_away():
                return self._leave(ended(attempt, outcome="left") if unstarted else attempt)
            if unstarted and self.job is not None and before and _is_unstarted_in(before[-1], self.job):
                return self._queue_anew(self.job, attempt, f"in job {self.job.number} Slurm starts no agent")
            if give_up:
                sentence = f"given up: {count} attempts in a row without a new checkpoint"
                return self._close(attempt, sentence, EXIT_FAILED)
            self._note(attempt, "started again" if self._nodes() else "too few nodes are left")
            if unstarted:
                time.sleep(_PAUSE_SECONDS)
        return self._give_up_nodes()

    def listen(self) -> None:
        """USR1 comes from Slurm before the time limit; the others from Slurm, a shell or a person."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            # Our script ignores USR1 until we are here; nohup ignores HUP for good.
            if signal.getsignal(number) is not signal.SIG_IGN or number is signal.SIGUSR1:
                signal.signal(number, self._ask)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number).name

    def _abandon(self) -> None:
        """Attempts whose supervisor was killed; the next one's owner token ends their writing."""
        for attempt in self.folder.attempts():
            if attempt.outcome is None:
                found = {
                    "to_step": self.folder.newest_step(),
                    "last_step": self.folder.last_step(attempt.number),
                }
                how = {"outcome": "abandoned", "cause": "its supervisor ended without a word"}
                then = "a new supervisor went on"
                self.folder.write_attempt(ended(attempt, **how, **found, ended=time.time(), then=then))

    def _nodes(self) -> tuple[str, ...] | None:
        """Those to start on: the allocation's first that are not bad; None when too few are left.

        If fewer will do: as many as the recipe can be fitted to.
        """
        if self.plan.kind == "local":
            return ("127.0.0.1",)
        given = self.job.nodes if self.job is not None else self.plan.hosts
        good = [node for node in given if node not in self.bad]
        most, least = min(len(good), self.plan.num_nodes), self.plan.min_nodes or self.plan.num_nodes
        fitting = (size for size in range(most, least - 1, -1) if self._overrides(size) is not None)
        size = next(fitting, None)
        return None if size is None else tuple(good[:size])

    def _overrides(self, num_nodes: int) -> tuple[str, ...] | None:
        """Of the recipe, on so many nodes; None: it cannot be trained on them."""
        if num_nodes == self.plan.num_nodes:
            return ()  # the launch has checked it
        from launch.layout import refit

        return refit(self.folder.recipe, num_nodes * self.plan.ranks_per_node)

    def _begin(self, nodes: tuple[str, ...]) -> Attempt:
        number = max((attempt.number for attempt in self.folder.attempts()), default=0) + 1
        attempt = Attempt(
            number=number,
            token=secrets.token_hex(8),
            nodes=nodes,
            began=time.time(),
            from_step=self.folder.newest_step(),
            job=None if self.job is None else self.job.number,
            overrides=self._overrides(len(nodes)) or (),
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
            "attempt %d: %d ranks on %s, from step %d%s; logs in %s",
            number,
            self.plan.sized(attempt).world_size,
            ", ".join(nodes),
            attempt.from_step,
            "".join(f", {override}" for override in attempt.overrides),
            self.folder.logs(number),
        )
        return attempt

    def _is_taken_away(self) -> bool:
        """Whether Slurm ends or requeues the job: it lets no agent begin then, a while before it tells us."""
        return self.job is not None and not self.job.is_running()

    def _leave(self, attempt: Attempt) -> int:
        """We were asked to end; the ranks have saved, or failed to."""
        if self.folder.stop.exists() or self.job is None:
            return self._close(attempt, "stopped; the same launch goes on from here", EXIT_STOPPED)
        if self._is_taken_away():
            return self._close(attempt, "left to Slurm, which ends or requeues the job", EXIT_STOPPED)
        # A requeue that comes before Slurm has noticed loses the job's GPUs; but it may have no other nodes to give.
        if self.bad and not self.job.has_given_up(self.bad):
            with suppress(LaunchError):
                return self._queue_as_another(self.job, attempt, self._without_bad())
        return self._requeue(attempt)

    def _give_up_nodes(self) -> int:
        attempt = self.folder.attempts()[-1]
        if self.job is None:
            without = ", ".join(sorted(self.bad))
            return self._close(attempt, f"given up: without {without} there are too few nodes", EXIT_FAILED)
        if self._is_taken_away():
            return self._leave(attempt)
        return self._queue_anew(self.job, attempt, self._without_bad())

    def _without_bad(self) -> str:
        return f"without {', '.join(sorted(self.bad))}"

    def _queue_anew(self, job: Job, attempt: Attempt, why: str) -> int:
        """As another job, or not at all."""
        try:
            return self._queue_as_another(job, attempt, why)
        except LaunchError as error:
            return self._close(
                attempt, f"given up: {why}, and Slurm takes no other job: {error}", EXIT_FAILED
            )

    def _queue_as_another(self, job: Job, attempt: Attempt, why: str) -> int:
        """Never again on nodes that are bad. Raises `LaunchError`: Slurm takes no other job."""
        other = job.submit_without(str(self.folder.home / "job.sbatch"), sorted(self.bad))
        write(self.folder.home / "job.json", {"job": other})
        return self._close(attempt, f"queued anew as job {other}: {why}", EXIT_STOPPED)

    def _requeue(self, attempt: Attempt) -> int:
        assert self.job is not None
        code = self._close(attempt, "requeued", EXIT_STOPPED)
        self.job.requeue()
        return code

    def _close(self, attempt: Attempt, then: str, code: int) -> int:
        self._note(attempt, then)
        return code

    def _note(self, attempt: Attempt, then: str) -> None:
        self.folder.write_attempt(ended(attempt, then=then))
        where = f": rank {attempt.rank} on {attempt.host}" if attempt.rank is not None else ""
        cause = f" ({attempt.cause})" if attempt.cause else ""
        log.get().info("attempt %d: %s%s%s; %s", attempt.number, attempt.outcome, where, cause, then)


def _is_unstarted_in(attempt: Attempt, job: Job) -> bool:
    """Whether Slurm started no agent of it, in this job: it may have lost what it gave the job, as Slurm 22.05 does."""
    return attempt.outcome == "unstarted" and attempt.job == job.number


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
