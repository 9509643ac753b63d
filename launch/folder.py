"""RUN/launch: what supervisor, agents and people tell each other about a run, as files on the shared file system.

plan.json             what was asked for; written once a launch
recipe.yaml           the resolved recipe that every attempt trains
owner                 NUMBER TOKEN of the attempt that may write
stop                  somebody wants the run to save and end
attempt_N/
  attempt.json        who, where, and how it ended
  lease               a number that the supervisor counts up; agents that see it stand still end their ranks
  order               what the supervisor wants of the agents: stop, stacks or end
  environment.json    what it ran in: packages, commit, modules, variables, GPUs
  meeting.json        where the ranks meet, found free by the agent of the first node
  node_I.json         what the agent of node I last saw of its ranks
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from launch.container import Container
from moe.errors import LaunchError

Kind = Literal["local", "hosts", "slurm"]
Order = Literal["stop", "stacks", "end"]


@dataclass(frozen=True)
class Limits:
    """When a run that goes wrong is acted upon."""

    agent_seconds: float = 120.0
    """For every node's agent to begin; a node without one is lost."""
    boot_seconds: float = 900.0
    """For the first step, imports and loading included."""
    hang_seconds: float = 300.0
    """For any later step with its evaluation or the part of a save that holds training; and to be halted in a boot."""
    lease_seconds: float = 15.0
    """Agents whose supervisor is silent for so long end their ranks; nodes that are silent for so long are lost."""
    save_seconds: float = 300.0
    """For ranks to save and leave when they are asked to stop."""
    fruitless_attempts: int = 3
    """Failed attempts in a row without a new checkpoint, after which the run is given up."""


@dataclass(frozen=True)
class Plan:
    """A launch, as every process of it needs to know it. All paths are absolute."""

    kind: Kind
    run_folder: str
    working_folder: str
    python: str
    num_nodes: int
    ranks_per_node: int
    hosts: tuple[str, ...] = ()
    """For kind hosts, spares included; else the launcher knows."""
    pdsh: bool = False
    """For kind hosts: start agents by DeepSpeed's launcher, which uses pdsh; else by ssh."""
    cpus_per_rank: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    """What ranks get beside what their node gives them."""
    limits: Limits = Limits()
    container: Container | None = None
    """For kind slurm: what agents and ranks run in."""
    first_attempt: int = 1
    """Of this launch; earlier ones belong to earlier launches of the same run."""
    min_nodes: int | None = None
    """How few will do when there are no more; None: all or nothing."""

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def python_of_ranks(self) -> str:
        """In the image, if there is one."""
        return self.python if self.container is None else self.container.python

    def sized(self, attempt: "Attempt") -> "Plan":
        """The plan with as many nodes as the attempt has."""
        return replace(self, num_nodes=len(attempt.nodes))


@dataclass(frozen=True)
class Attempt:
    """One start of all ranks, and how it ended."""

    number: int
    token: str
    nodes: tuple[str, ...]
    began: float
    """Seconds since 1970, of the supervisor's clock, as all times here."""
    from_step: int
    """Of the newest checkpoint when it began."""
    job: str | None = None
    """Slurm's number of the job."""
    ended: float | None = None
    outcome: str | None = None
    """done, saved, failed, hung, lost, unstarted, left, refused or abandoned; None while it runs."""
    rank: int | None = None
    """The first that failed."""
    host: str | None = None
    cause: str | None = None
    last_step: int | None = None
    to_step: int | None = None
    """Of the newest checkpoint when it ended."""
    then: str | None = None
    """What was done about it."""
    overrides: tuple[str, ...] = ()
    """Of the recipe, for as many ranks as there are."""

    @property
    def owner(self) -> str:
        return f"{self.number} {self.token}"


@dataclass(frozen=True)
class RankReport:
    """What an agent last saw of one rank."""

    rank: int
    pid: int
    step: int | None = None
    """The last step that it took, or began with; None: it has not begun."""
    beats: int = 0
    works: float = 0.0
    """Of late, seconds of a step in which it does something itself; 0 if nothing is known."""
    waits: float = 0.0
    """The other seconds of a step: it waits for its peers."""
    still_seconds: float = 0.0
    """Since its last beat, or its start."""
    code: int | None = None
    """As subprocess has it: negative for a signal; None while it lives."""
    seconds_dead: float = 0.0
    killed: bool = False
    """Whether it lived until its agent ended it."""
    stopped: bool = False
    """Whether it is halted by a signal (SIGSTOP) or a debugger."""
    halted_seconds: float = 0.0
    """For how long it has been halted by a signal while its agent was not."""
    stack: str | None = None


@dataclass(frozen=True)
class NodeReport:
    """What one agent last said; `count` grows while it lives."""

    node: int
    host: str
    count: int
    ranks: tuple[RankReport, ...]
    asked: str | None = None
    """The signal that asked the agent itself to stop."""
    ended: bool = False


@dataclass(frozen=True)
class LaunchFolder:
    """The files by name."""

    run: Path

    @property
    def home(self) -> Path:
        return self.run / "launch"

    @property
    def stop(self) -> Path:
        return self.home / "stop"

    @property
    def owner(self) -> Path:
        return self.home / "owner"

    @property
    def recipe(self) -> Path:
        return self.home / "recipe.yaml"

    @property
    def done(self) -> Path:
        return self.run / "done"

    def attempt_folder(self, number: int) -> Path:
        return self.home / f"attempt_{number}"

    def logs(self, number: int) -> Path:
        return self.run / "logs" / f"attempt_{number}"

    def log(self, number: int, rank: int) -> Path:
        return self.logs(number) / f"rank_{rank}.log"

    def write_plan(self, plan: Plan) -> None:
        write(self.home / "plan.json", asdict(plan))

    def plan(self) -> Plan:
        """Raises `LaunchError` if nothing was launched there."""
        page = read(self.home / "plan.json")
        if page is None:
            raise LaunchError(
                f"{self.run} has no launch/plan.json: it was not started by `turnout launch`. "
                f"Give the folder of a run that was."
            )
        page = page | {"hosts": tuple(page["hosts"]), "limits": Limits(**page["limits"])}
        if (inside := page.get("container")) is not None:
            page["container"] = Container(**inside | {"mounts": tuple(inside["mounts"])})
        return Plan(**page)

    def write_attempt(self, attempt: Attempt) -> None:
        write(self.attempt_folder(attempt.number) / "attempt.json", asdict(attempt))

    def attempt(self, number: int) -> Attempt | None:
        page = read(self.attempt_folder(number) / "attempt.json")
        lists = {name: tuple((page or {}).get(name, ())) for name in ("nodes", "overrides")}
        return None if page is None else Attempt(**page | lists)

    def attempts(self) -> list[Attempt]:
        """Oldest first."""
        numbers = sorted(int(path.name.rpartition("_")[2]) for path in self.home.glob("attempt_*"))
        return [attempt for number in numbers if (attempt := self.attempt(number)) is not None]

    def write_report(self, number: int, report: NodeReport) -> None:
        write(self.attempt_folder(number) / f"node_{report.node}.json", asdict(report))

    def reports(self, number: int) -> list[NodeReport]:
        """Of the nodes whose agents have said anything, by node."""
        found = []
        for path in self.attempt_folder(number).glob("node_*.json"):
            page = read(path)
            if page is not None:
                ranks = tuple(RankReport(**rank) for rank in page["ranks"])
                found.append(NodeReport(**page | {"ranks": ranks}))
        return sorted(found, key=lambda report: report.node)

    def last_step(self, number: int) -> int | None:
        """That any rank of the attempt took, as far as its agent has said."""
        steps = (
            rank.step for report in self.reports(number) for rank in report.ranks if rank.step is not None
        )
        return max(steps, default=None)

    def newest_step(self) -> int:
        """Of the checkpoints; 0 without. Looks at names alone, for it must not fail where training would."""
        steps = [path.name.removeprefix("step_") for path in (self.run / "checkpoints").glob("step_*")]
        return max((int(step) for step in steps if step.isdigit()), default=0)


def ended(attempt: Attempt, **how: Any) -> Attempt:
    """The attempt with what is known at its end."""
    return replace(attempt, **how)


def fruitless(attempts: Sequence[Attempt]) -> int:
    """How many attempts, counted from the last, went wrong without a new checkpoint; requeues do not begin anew.

    One that was left before an agent began, since Slurm took the job away, went neither wrong nor well.
    """
    count = 0
    for attempt in reversed(attempts):
        if attempt.outcome == "left":
            continue
        if attempt.outcome in ("done", "saved") or (attempt.to_step or 0) > attempt.from_step:
            break
        count += 1
    return count


def read(path: Path) -> dict[str, Any] | None:
    """A page; None if it is not there."""
    try:
        page: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return page


def write(path: Path, page: Mapping[str, Any]) -> None:
    """Whole or not at all, for readers; not synced, since it tells of now."""
    write_text(path, json.dumps(page, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
