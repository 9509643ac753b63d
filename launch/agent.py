"""One node's part of an attempt: start its ranks, watch and report them, end them; the same under every launcher.

    python -m launch.agent RUN --attempt N [--node I]

No rank outlives the agent (the kernel sees to that), and no agent outlives its supervisor's lease. An agent ends
what it started by pid and process group, and so never touches another job.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from launch import heir, surroundings
from launch.awake import Awake
from launch.container import without_the_hosts
from launch.folder import LaunchFolder, NodeReport, Plan, read, write
from launch.port import free_port
from launch.rank import Rank
from moe.attempt import BEAT, OWNER, STACKS
from moe.errors import EXIT_STOPPED, LaunchError, clean_exit
from moe.orphans import die_with_parent

_POLL_SECONDS = 0.1
_REPORT_SECONDS = 0.5
_MEETING_SECONDS = 120.0


@dataclass
class Agent:
    """The ranks of one node."""

    folder: LaunchFolder
    plan: Plan
    number: int
    node: int
    host: str
    scratch: Path
    ranks: list[Rank] = field(default_factory=list)
    clock: Awake = field(default_factory=Awake)
    asked: str | None = None
    count: int = 0

    def run(self) -> int:
        """Until no rank lives; the exit code, which is information only."""
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)
        signal.signal(signal.SIGUSR1, self._ask)
        self._report()
        try:
            self._start()
            self._watch()
        finally:
            for rank in self.ranks:
                rank.end()
            self._report(ended=True)
        self._look_after_run()
        codes = {rank.process.returncode for rank in self.ranks}
        return 0 if codes == {0} else EXIT_STOPPED if codes <= {0, EXIT_STOPPED} else 1

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number).name

    def _start(self) -> None:
        address, port = self._meeting()
        attempt = self.folder.attempt(self.number)
        assert attempt is not None
        logs = self.folder.logs(self.number)
        logs.mkdir(parents=True, exist_ok=True)
        for local_rank in range(self.plan.ranks_per_node):
            rank = self.node * self.plan.ranks_per_node + local_rank
            beat, stacks = self.scratch / f"beat_{rank}", self.scratch / f"stacks_{rank}"
            told = {
                "RANK": rank,
                "WORLD_SIZE": self.plan.world_size,
                "LOCAL_RANK": local_rank,
                "LOCAL_WORLD_SIZE": self.plan.ranks_per_node,
                "MASTER_ADDR": address,
                "MASTER_PORT": port,
                OWNER: attempt.owner,
                BEAT: beat,
                STACKS: stacks,
            }
            with self.folder.log(self.number, rank).open("ab") as log:
                process = subprocess.Popen(
                    [
                        self.plan.python_of_ranks,
                        "-u",
                        "-m",
                        "moe.train",
                        str(self.folder.recipe),
                        *attempt.overrides,
                    ],
                    cwd=self.plan.working_folder,
                    env=environment(self.plan) | {name: str(value) for name, value in told.items()},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            self.ranks.append(Rank(rank, process, beat, stacks, self.clock, self.clock.seconds()))
        if self.node == 0:
            surroundings.record_beside(self.folder, self.plan, attempt, environment(self.plan))

    def _meeting(self) -> tuple[str, int]:
        """Where the ranks meet. The first node's agent finds a free port there; the others wait for its word."""
        path = self.folder.attempt_folder(self.number) / "meeting.json"
        if self.node == 0:
            write(path, {"address": self.host, "port": free_port()})
        end = time.monotonic() + _MEETING_SECONDS
        while (page := read(path)) is None:
            if time.monotonic() > end or self._orders() == "end":
                raise LaunchError(
                    f"node {self.node} ({self.host}) heard nothing of the first node's agent in {path}. "
                    f"Is {self.folder.run} on a file system that all nodes share? `turnout doctor` tells."
                )
            time.sleep(_POLL_SECONDS)
        return page["address"], page["port"]

    def _watch(self) -> None:
        lease, seen, said = self._lease(), self.clock.seconds(), 0.0
        while any(rank.died is None for rank in self.ranks):
            time.sleep(_POLL_SECONDS)
            now = self.clock.seconds()
            if (current := self._lease()) != lease:
                lease, seen = current, now
            died = [rank.died for rank in self.ranks]
            for rank in self.ranks:
                rank.look()
            order = self._orders()
            if order == "stacks":
                for rank in self.ranks:
                    rank.ask_for_stack()
            if order == "stop" or self.asked in ("SIGTERM", "SIGINT"):
                for rank in self.ranks:
                    rank.ask_to_stop()
            if (
                order == "stacks"
                or now - said > _REPORT_SECONDS
                or died != [rank.died for rank in self.ranks]
            ):
                self._report()
                said = now
            if order == "end" or now - seen > self.plan.limits.lease_seconds:
                return

    def _look_after_run(self) -> None:
        """Where nobody else would."""
        silence = self.plan.limits.lease_seconds
        if (
            self.plan.kind == "slurm"
            and self.asked is None
            and heir.is_gone(self.folder, self.number, silence)
        ):
            heir.inherit(self.folder, self.number, self.host)

    def _orders(self) -> str | None:
        return _text(self.folder.attempt_folder(self.number) / "order")

    def _lease(self) -> str | None:
        return _text(self.folder.attempt_folder(self.number) / "lease")

    def _report(self, *, ended: bool = False) -> None:
        self.count += 1
        reports = tuple(rank.report() for rank in self.ranks)
        with suppress(OSError):  # a file system that is away for a while is the supervisor's to judge
            self.folder.write_report(
                self.number, NodeReport(self.node, self.host, self.count, reports, self.asked, ended)
            )


def environment(plan: Plan) -> dict[str, str]:
    """What every rank of this node gets: the node's variables, then those that came with the launch."""
    given = dict(plan.environment)
    env = dict(os.environ) | (given if plan.container is None else without_the_hosts(given))
    if plan.kind == "hosts":
        # DeepSpeed's launcher counts one process a node, and would leave it one GPU.
        env.pop("CUDA_VISIBLE_DEVICES", None)
        if "CUDA_VISIBLE_DEVICES" in plan.environment:
            env["CUDA_VISIBLE_DEVICES"] = plan.environment["CUDA_VISIBLE_DEVICES"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores // plan.ranks_per_node)))
    return env


def _text(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text(encoding="utf-8").strip() or None
    return None


def _place(plan: Plan, given: int | None) -> tuple[int, str]:
    """This node's number and the name by which the others reach it."""
    if plan.kind == "slurm":
        return int(os.environ["SLURM_PROCID"]), os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if plan.kind == "local":
        return 0, "127.0.0.1"
    return int(os.environ["RANK"]) if given is None else given, ""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="launch.agent", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument(
        "--node", type=int, help="Which of the attempt's nodes this is; else the launcher says it."
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = LaunchFolder(given.run)
    plan, attempt = folder.plan(), folder.attempt(given.attempt)
    if attempt is None:
        raise LaunchError(
            f"{given.run} has no attempt {given.attempt}. Agents are started by `turnout launch`."
        )
    node, host = _place(plan, given.node)
    scratch = Path(tempfile.mkdtemp(prefix="turnout-", dir=_memory()))
    try:
        plan = plan.sized(attempt)
        return Agent(folder, plan, given.attempt, node, host or attempt.nodes[node], scratch).run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108  beats shall not wait for a disk


if __name__ == "__main__":
    with clean_exit():
        sys.exit(main())
