"""Machines -> a Slurm cluster of them: munge, slurmctld, a slurmd each, fake GPUs."""

import os
import secrets
import stat
import subprocess
import time
from dataclasses import dataclass

from launch.testbed.machines import CONTROLLER, Machines
from moe.errors import LaunchError

_SECONDS = 60.0
_CONF = """\
ClusterName=testbed
SlurmctldHost={controller}
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
# A requeued job waits for so long before it starts again; Slurm refuses less than 5 and has 120 by default.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pid/slurmctld
SlurmdPidFile={folder}/pid/slurmd-%n
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd-%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
# Nodes may say that they have more cores than the box.
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
KillWait=20
SchedulerParameters=batch_sched_delay=0,nohold_on_prolog_fail,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PrologFlags=Alloc
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs
GresTypes=gpu
NodeName={nodes} CPUs={cpus} RealMemory=8000{gres} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Cluster:
    """Slurm on the machines of a testbed."""

    machines: Machines

    @property
    def env(self) -> dict[str, str]:
        """What Slurm's commands need on the machines."""
        return {"SLURM_CONF": str(self.machines.folder / "slurm.conf")}

    @classmethod
    def up(cls, machines: Machines, cpus: int, gpus: int) -> "Cluster":
        """Start the daemons; returns when every node is idle. Raises `LaunchError`."""
        cluster = cls(machines)
        cluster._write_files(cpus, gpus)
        munge = machines.folder / "munge"
        files = {f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")}
        machines.run(CONTROLLER, ["munged", "--force", f"--socket={munge / 'socket'}", *sorted(files)])
        cluster.start_controller()
        for node in machines.nodes:
            cluster.start_node(node)
        cluster._wait_for_nodes()
        return cluster

    def start_controller(self) -> None:
        """Start slurmctld, also after its end."""
        self._start(CONTROLLER, ["slurmctld"])

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, also after its end."""
        self._start(node, ["slurmd", "-N", node])

    def states(self) -> dict[str, str]:
        """Of every node, as sinfo says it: idle, mixed, allocated, down, ..."""
        said = self.machines.run(
            CONTROLLER, ["sinfo", "--noheader", "-N", "-p", "main", "-o", "%N %T"], env=self.env
        )
        return dict(line.split() for line in said.splitlines())

    def _start(self, machine: str, command: list[str]) -> None:
        """A daemon keeps the pipes that it is given, so it gets a file."""
        log = self.machines.folder / "log" / f"{machine}.console"
        with log.open("ab") as console:
            done = subprocess.run(
                self.machines.on(machine, command),
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        if done.returncode:
            raise LaunchError(
                f"{command[0]} did not start on {machine}: {log.read_text(errors='replace')[-500:].strip()}"
            )

    def _write_files(self, cpus: int, gpus: int) -> None:
        folder, nodes = self.machines.folder, self.machines.nodes
        for name in ("state", "spool", "gpus", "munge"):
            (folder / name).mkdir(mode=0o755)
        key = folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        page = _CONF.format(
            controller=CONTROLLER,
            folder=folder,
            nodes=f"n[1-{len(nodes)}]",
            cpus=cpus,
            gres=f" Gres=gpu:{gpus}" if gpus else "",
        )
        (folder / "slurm.conf").write_text(page, encoding="utf-8")
        # Slurm wants its devices to exist, no more: these are further names of /dev/null.
        for number in range(gpus):
            os.mknod(folder / "gpus" / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        devices = f"{folder}/gpus/gpu[0-{gpus - 1}]" if gpus > 1 else f"{folder}/gpus/gpu0"
        (folder / "gres.conf").write_text(f"Name=gpu File={devices}\n" if gpus else "", encoding="utf-8")

    def _wait_for_nodes(self) -> None:
        end = time.monotonic() + _SECONDS
        states: dict[str, str] = {}
        while set(states.values()) != {"idle"} or len(states) < len(self.machines.nodes):
            if time.monotonic() > end:
                raise LaunchError(
                    f"after {_SECONDS:.0f} s Slurm's nodes are not all idle: {states}. "
                    f"Logs are in {self.machines.folder / 'log'}."
                )
            time.sleep(0.1)
            try:
                states = self.states()
            except LaunchError:  # slurmctld does not answer yet
                states = {}
