"""An attempt -> the commands that start its agents, one a node, under each launcher."""

import os
import shlex
from collections.abc import Sequence

from launch.folder import Attempt, LaunchFolder, Plan

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5")


def commands(folder: LaunchFolder, plan: Plan, attempt: Attempt) -> list[list[str]]:
    """Each to be run beside the others, in the working folder, until it ends."""
    agent = ["-m", "launch.agent", str(folder.run), "--attempt", str(attempt.number)]
    if plan.kind == "local":
        return [[plan.python, "-u", *agent]]
    if plan.kind == "slurm":
        options, command = list[str](), [plan.python, "-u", *agent]
        if plan.container is not None:
            inside = [plan.container.python, "-u", *agent]
            options, command = plan.container.command([plan.working_folder, plan.run_folder], inside)
        return [[*srun(plan, attempt.nodes), *options, *command]]
    if plan.pdsh:
        return [_deepspeed(folder, plan, attempt, agent[1:])]
    return [
        [*SSH, host, remotely(plan, [plan.python, "-u", *agent, "--node", str(node)])]
        for node, host in enumerate(attempt.nodes)
    ]


def srun(plan: Plan, nodes: Sequence[str]) -> list[str]:
    """One task on each of `nodes`; agents decide themselves when to end, and bind no rank to a core."""
    number = str(plan.num_nodes)
    command = ["srun", f"--nodes={number}", f"--ntasks={number}", "--ntasks-per-node=1"]
    if plan.cpus_per_rank is not None:
        command.append(f"--cpus-per-task={plan.cpus_per_rank * plan.ranks_per_node}")
    nodelist = f"--nodelist={','.join(nodes)}"
    return [
        *command,
        nodelist,
        "--overlap",
        "--cpu-bind=none",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--no-kill",
    ]


def hostfile(attempt: Attempt, ranks_per_node: int) -> str:
    """For DeepSpeed's launcher."""
    lines = [f"{host} slots=1\n" for host in attempt.nodes]
    return f"# One slot a node: an agent, which starts the {ranks_per_node} ranks.\n{''.join(lines)}"


def remotely(plan: Plan, command: Sequence[str]) -> str:
    """`command` as one line for a shell on another host, in the same folder and with what Python needs."""
    carried = [f"{name}={os.environ[name]}" for name in ("PYTHONPATH", "PATH") if name in os.environ]
    return f"cd {shlex.quote(plan.working_folder)} && exec {shlex.join(['env', *carried, *command])}"


def _deepspeed(folder: LaunchFolder, plan: Plan, attempt: Attempt, module: Sequence[str]) -> list[str]:
    """Its front end forwards PYTHON* variables and the folder; of ranks it knows nothing, only of agents."""
    return [
        *(plan.python, "-u", "-m", "deepspeed.launcher.runner"),
        *(
            "--hostfile",
            str(folder.home / "hostfile"),
            "--launcher",
            "pdsh",
            "--force_multi",
            "--no_ssh_check",
        ),
        *("--master_addr", attempt.nodes[0], "--no_local_rank", "--module"),
        *module,
    ]
