"""Every fault that is planted in launched runs, and the table of what they cost.

    python -m tests.cluster.faults [NAME]...

prints the table; without names: of all faults. As root, on a testbed of its own; a minute and more a fault.
"""

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click
import psutil

from launch.testbed.machines import CONTROLLER
from moe.errors import LaunchError
from tests.cluster.conftest import Place, wait
from tests.cluster.cost import Fault, a_place, suffer, undisturbed

HEAD = """\
| fault | s to the first new step | s of a boot | s beyond it | goal | steps lost | attempts | weights |
|---|--:|--:|--:|--:|--:|---|---|"""


def kill(place: Place, run: str) -> None:
    place.kill(run, 3, "KILL")


def kill_agent(node: str) -> Callable[[Place, str], None]:
    def strike(place: Place, run: str) -> None:
        for pid in place.cluster.machines.pids(node):
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if "launch.agent" in process.cmdline() and "srun" not in process.name():
                    process.kill()

    return strike


def halt(place: Place, run: str) -> None:
    place.kill(run, 2, "STOP")


def usr1(place: Place, run: str) -> None:
    place.slurm("scancel", "--signal=USR1", "--batch", place.job(run))  # as Slurm does before the time limit


def requeue(place: Place, run: str) -> None:
    place.slurm("scontrol", "requeue", place.job(run))


def preempt(place: Place, run: str) -> None:
    """By a job for a node that the run has and that is never off: one that waits for a dead node holds back all."""
    urgent = ["--partition=urgent", "--nodelist=n1", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    place.slurm("sbatch", *urgent)


def time_limit(place: Place, run: str) -> float:
    order = place.files(run).attempt_folder(1) / "order"
    wait(order.exists, "Slurm's signal before the time limit", 120)
    return time.time()


def drain(place: Place, run: str) -> None:
    place.slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=a test")


def _resume(place: Place) -> None:
    place.slurm("scontrol", "update", "NodeName=n2", "State=RESUME")
    whole(place)


def power_off(node: str) -> Callable[[Place, str], None]:
    def strike(place: Place, run: str) -> None:
        place.cluster.machines.unplug(node)  # first, so that nobody hears of its end
        place.cluster.machines.crash(node)

    return strike


def boot(node: str) -> Callable[[Place], None]:
    def mend(place: Place) -> None:
        place.cluster.machines.plug(node)
        place.cluster.machines.boot(node)
        place.cluster.start_node(node)
        whole(place)

    return mend


def unplug(seconds: float) -> Callable[[Place, str], None]:
    def strike(place: Place, run: str) -> None:
        place.cluster.machines.unplug("n2")
        time.sleep(seconds)
        place.cluster.machines.plug("n2")

    return strike


def kill_daemon(machine: str, name: str, seconds: float) -> Callable[[Place, str], None]:
    def strike(place: Place, run: str) -> None:
        for pid in place.cluster.machines.pids(machine):
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if Path(process.exe()).name == name:
                    process.kill()
                    process.wait(10)
        time.sleep(seconds)
        if machine == CONTROLLER:
            place.cluster.start_controller()
        else:
            place.cluster.start_node(machine)

    return strike


def whole(place: Place) -> None:
    def idle() -> bool:
        try:
            return set(place.cluster.states().values()) == {"idle"}
        except LaunchError:  # slurmctld does not answer yet
            return False

    wait(idle, "all nodes to be idle", 120)


_MINUTE = ("--time", "1", "--signal-before", "35")
"""The least that Slurm knows; ranks that save before they have booted would never be done."""
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("kill -9 of a rank", kill, goal=4.0),
        Fault("kill -9 of an agent", kill_agent("n2")),
        Fault("SIGSTOP of a rank", halt, outcome="hung"),
        Fault("USR1", usr1, outcome="saved"),
        Fault("scontrol requeue", requeue, outcome="saved"),
        Fault("preemption", preempt, outcome="saved"),
        Fault("time limit", time_limit, outcome="saved", at=1, options=_MINUTE, steps=400),
        Fault("drain", drain, _resume, outcome="saved", steps=150),
        Fault("power-off, with a spare", power_off("n2"), boot("n2"), spares=1, outcome="lost", goal=12.0),
        Fault("power-off, no spare", power_off("n2"), boot("n2"), outcome="lost"),
        Fault("power-off of the first node", power_off("n1"), boot("n1"), outcome="abandoned"),
        Fault("link down for 3 s", unplug(3.0), whole, outcome="done"),
        Fault("link down for 40 s", unplug(40.0), whole, outcome="hung"),
        Fault("slurmd killed for 3 s", kill_daemon("n2", "slurmd", 3.0), whole, outcome="done"),
        Fault("slurmd killed for 40 s", kill_daemon("n2", "slurmd", 40.0), whole, outcome="done", steps=600),
        Fault("slurmctld restarted", kill_daemon(CONTROLLER, "slurmctld", 3.0), whole, outcome="done"),
    )
}


def folder(fault: Fault) -> str:
    """Of its run."""
    return f"runs/{re.sub('[^a-z0-9]+', '-', fault.name.lower())}"


def row(place: Place, fault: Fault) -> str:
    """The fault's line of the table."""
    expected = undisturbed(place, fault.steps)
    cost = suffer(place, folder(fault), fault)
    same = place.weights(folder(fault)) == place.weights(expected)
    beyond = cost.seconds - cost.boot if len(cost.attempts) > 1 else cost.seconds
    goal = "" if fault.goal is None else f"{fault.goal:.0f}"
    outcomes = ", ".join(str(attempt.outcome) for attempt in cost.attempts)
    if (first := cost.attempts[0]).outcome == "hung":
        outcomes = f"{outcomes}: stopped after {cost.stopped:.1f} s, rank {first.rank} on {first.host}"
    numbers = f"{cost.seconds:.1f} | {cost.boot:.1f} | {beyond:.1f} | {goal} | {cost.lost}"
    return f"| {fault.name} | {numbers} | {outcomes} | {'the same' if same else 'OTHERS'} |"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(FAULTS)))
def command(names: tuple[str, ...]) -> None:
    """Plant the faults of these NAMES, or all, one after another, and print the table."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    with a_place() as place:
        click.echo(HEAD)
        for name in names or FAULTS:
            click.echo(row(place, FAULTS[name]))


if __name__ == "__main__":
    command()
