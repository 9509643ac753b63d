"""`turnout testbed up|down|status|on`: a cluster to try launches on, on this box alone."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

from launch.testbed.machines import CONTROLLER, Machines
from launch.testbed.slurm import Cluster
from moe.errors import LaunchError

DEFAULT_FOLDER = Path("/tmp/turnout-testbed")  # noqa: S108  made by us alone, and refused if it is there
_NEEDS = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}
_SLURM_NEEDS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
_SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

_folder = click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=DEFAULT_FOLDER,
    show_default=True,
    help="Where all of it lies.",
)


@click.group()
def command() -> None:
    """Several machines on this box, as namespaces: try a launch without a cluster. Linux, root.

    Each has its own network, hostname and processes, an sshd and a slurmd; files are shared, as on a cluster.
    """
    os.environ["PATH"] = _SYSTEM_PATH  # daemons live there, and users' paths often leave it out


@command.command()
@_folder
@click.option("--nodes", type=click.IntRange(1, 200), default=2, show_default=True)
@click.option(
    "--cpus", type=click.IntRange(min=1), default=4, show_default=True, help="That a node says it has."
)
@click.option(
    "--gpus", type=click.IntRange(min=0), default=2, show_default=True, help="Fake ones, for Slurm."
)
@click.option("--slurm/--no-slurm", default=True, show_default=True, help="Slurm on top of sshd.")
def up(folder: Path, nodes: int, cpus: int, gpus: int, slurm: bool) -> None:
    """Start the machines; seconds."""
    check(slurm=slurm)
    began = time.monotonic()
    machines = Machines.up(folder.absolute(), nodes)
    if slurm:
        try:
            Cluster.up(machines, cpus, gpus)
        except BaseException:
            machines.down()
            raise
    click.echo(
        f"{nodes} nodes and {CONTROLLER} are up in {time.monotonic() - began:.1f} s, in {machines.folder}"
    )
    where = "" if folder == DEFAULT_FOLDER else f" --folder {folder}"
    click.echo(f"try: turnout testbed on{where} {CONTROLLER} {'sinfo' if slurm else 'ssh n1 hostname'}")


@command.command()
@_folder
def down(folder: Path) -> None:
    """End them, with every process on them; leaves nothing."""
    check(slurm=False)
    Machines.find(folder.absolute()).down()
    click.echo(f"{folder} is gone, and its machines with it")


@command.command()
@_folder
def status(folder: Path) -> None:
    """Say which machines are up, and what Slurm says of them."""
    check(slurm=False)
    machines = Machines.find(folder.absolute())
    slurm = (machines.folder / "slurm.conf").exists()
    try:
        states = Cluster(machines).states() if slurm else {}
    except LaunchError as error:
        states = {}
        click.echo(f"slurmctld does not answer: {error}")
    for name in machines.names:
        number = len(machines.pids(name))
        click.echo(f"{name}\t{f'{number} processes' if number else 'down'}\t{states.get(name, '')}".rstrip())


@command.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_folder
@click.argument("machine")
@click.argument("arguments", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
def on(folder: Path, machine: str, arguments: tuple[str, ...]) -> None:
    """Run COMMAND on MACHINE (ctl, n1, n2, ...), in this folder."""
    check(slurm=False)
    machines = Machines.find(folder.absolute())
    env = {**os.environ, **Cluster(machines).env}
    sys.exit(subprocess.run(machines.on(machine, arguments), env=env).returncode)


def check(*, slurm: bool) -> None:
    """Raise `LaunchError` where no testbed can be."""
    if sys.platform != "linux":
        raise LaunchError(
            f"the testbed is made of Linux namespaces, but this is {sys.platform}. Use a Linux box."
        )
    if os.geteuid() != 0:
        raise LaunchError(
            "the testbed makes networks and mounts, which only root may, but you are not root. "
            "Use sudo, or a privileged container."
        )
    needs = _NEEDS | (_SLURM_NEEDS if slurm else {})
    missing = sorted(
        {package for tool, package in needs.items() if not shutil.which(tool, path=_SYSTEM_PATH)}
    )
    if missing:
        raise LaunchError(
            f"the testbed needs what is not installed here. On Debian or Ubuntu: "
            f"apt install --no-install-recommends {' '.join(missing)}"
            + (", or use --no-slurm." if slurm else ".")
        )
