"""A folder and a number -> machines in namespaces on a bridge of their own; and their end."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from moe.errors import LaunchError

CONTROLLER = "ctl"
_RECORD = "testbed.json"
_INIT = Path(__file__).with_name("machine.sh")
_LONGEST_FOLDER = 80
_SECONDS = 30.0
_SYSTEM = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
_CLIENT = """\
Host *
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
  IdentityFile {folder}/ssh/user
  ConnectTimeout 5
  ServerAliveInterval 5
  ServerAliveCountMax 2
"""
_SERVER = """\
HostKey {folder}/ssh/host
AuthorizedKeysFile {folder}/ssh/user.pub
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
StrictModes no
UseDNS no
PidFile none
MaxStartups 200
MaxSessions 200
"""


@dataclass(frozen=True)
class Machines:
    """The machines of one testbed. A controller `ctl` and nodes n1 to nN see each other and nothing else."""

    folder: Path
    nodes: tuple[str, ...]
    prefix: str
    """Of the names of their network namespaces, so that testbeds in two folders live side by side."""

    @property
    def names(self) -> tuple[str, ...]:
        return (CONTROLLER, *self.nodes)

    @classmethod
    def up(cls, folder: Path, num_nodes: int) -> "Machines":
        """Make the folder and start the machines; nothing is left if one does not start.

        Raises `LaunchError`.
        """
        if len(str(folder)) > _LONGEST_FOLDER or folder.is_relative_to("/run"):
            raise LaunchError(
                f"the testbed's folder is {folder}: it must not be below /run, nor its path be longer than "
                f"{_LONGEST_FOLDER} characters, since sockets are made in it. Choose another by --folder."
            )
        try:
            folder.mkdir(parents=True, mode=0o755)
        except FileExistsError:
            raise LaunchError(
                f"{folder} exists already: a testbed is up there, or something else is. "
                f"End it by `turnout testbed down --folder {folder}`, or choose another by --folder."
            ) from None
        nodes = tuple(f"n{number}" for number in range(1, num_nodes + 1))
        machines = cls(folder, nodes, f"testbed-{folder.stat().st_ino:x}-")
        try:
            machines._write_files()
            machines._connect()
            for name in machines.names:
                machines.boot(name)
        except BaseException:
            machines.down()
            raise
        return machines

    @classmethod
    def find(cls, folder: Path) -> "Machines":
        """The testbed of that folder. Raises `LaunchError` if there is none."""
        try:
            record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise LaunchError(
                f"there is no testbed in {folder}. Make one by `turnout testbed up --folder {folder}`."
            ) from None
        return cls(folder, tuple(record["nodes"]), record["prefix"])

    def boot(self, name: str) -> None:
        """Start a machine, or start it again after `crash`; returns when its sshd listens."""
        with (self.folder / "log" / f"{name}.console").open("ab") as console:
            outer = subprocess.Popen(
                [
                    *("nsenter", f"--net=/run/netns/{self.prefix}{name}"),
                    *("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child"),
                    *("sh", str(_INIT), name, str(self.folder)),
                ],
                env=_SYSTEM,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        end = time.monotonic() + _SECONDS
        while not (first := _first_child(outer.pid)) or not _listens(first, port=22):
            if outer.poll() is not None or time.monotonic() > end:
                said = (self.folder / "log" / f"{name}.console").read_text(errors="replace")[-500:]
                raise LaunchError(
                    f"machine {name} of the testbed did not start: {said.strip() or 'no sshd listens'}. "
                    f"It needs a kernel that lets root make namespaces; inside a container, run that privileged."
                )
            time.sleep(0.01)
        (self.folder / "pid" / name).write_text(str(first))

    def pids(self, name: str) -> list[int]:
        """All processes of a machine."""
        found = _ip("netns", "pids", f"{self.prefix}{name}", check=False)
        return [int(pid) for pid in found.split()]

    def crash(self, name: str) -> None:
        """End a machine and all its processes at once; their peers see connections reset."""
        self._kill(name)

    def unplug(self, name: str) -> None:
        """Pull a machine's network cable."""
        _ip("-n", f"{self.prefix}switch", "link", "set", f"v-{name}", "down")

    def plug(self, name: str) -> None:
        """Put it in again."""
        _ip("-n", f"{self.prefix}switch", "link", "set", f"v-{name}", "up")

    def on(self, name: str, command: Sequence[str]) -> list[str]:
        """`command` as a command line that runs on a machine, in this folder."""
        if name not in self.names:
            raise LaunchError(f"the testbed has no machine {name!r}. Use one of {', '.join(self.names)}.")
        pid = (self.folder / "pid" / name).read_text()
        if int(pid) not in self.pids(name):
            raise LaunchError(
                f"machine {name} of the testbed is down. Take another, or start the testbed anew."
            )
        spaces = ("--net", "--uts", "--mount", "--pid")
        return ["nsenter", "--target", pid, *spaces, f"--wdns={Path.cwd()}", "--", *command]

    def run(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
        """What `command` prints on a machine. Raises `LaunchError` if it fails."""
        done = subprocess.run(
            self.on(name, command), env={**os.environ, **(env or {})}, capture_output=True, text=True
        )
        if done.returncode:
            raise LaunchError(
                f"`{' '.join(command)}` on {name} of the testbed ended with code {done.returncode}: "
                f"{(done.stderr or done.stdout).strip()[-500:]}. Logs are in {self.folder / 'log'}."
            )
        return done.stdout

    def down(self) -> None:
        """End every process of every machine; remove networks, cgroups and the folder."""
        for name in self.names:
            self._kill(name)
        for name in (*self.names, "switch"):
            if Path(f"/run/netns/{self.prefix}{name}").exists():
                _ip("netns", "del", f"{self.prefix}{name}")
        shutil.rmtree(self.folder)

    def _write_files(self) -> None:
        for name in ("log", "pid", "ssh"):
            (self.folder / name).mkdir(mode=0o700 if name == "ssh" else 0o755)
        record = {"nodes": self.nodes, "prefix": self.prefix}
        (self.folder / _RECORD).write_text(json.dumps(record), encoding="utf-8")
        lines = [f"{self._address(name)} {name}\n" for name in self.names]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines), encoding="utf-8")
        for name, page in (("client", _CLIENT), ("server", _SERVER)):
            (self.folder / "ssh" / name).write_text(page.format(folder=self.folder), encoding="utf-8")
        for key in ("user", "host"):
            path = str(self.folder / "ssh" / key)
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)

    def _address(self, name: str) -> str:
        return f"10.77.0.{254 if name == CONTROLLER else int(name[1:])}"

    def _connect(self) -> None:
        switch = f"{self.prefix}switch"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for name in self.names:
            space = f"{self.prefix}{name}"
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip(
                "-n",
                space,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                f"v-{name}",
                "netns",
                switch,
            )
            _ip("-n", space, "addr", "add", f"{self._address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", switch, "link", "set", f"v-{name}", "master", "bridge", "up")

    def _kill(self, name: str) -> None:
        """The kernel ends a PID namespace with its first process; what entered from outside is ended by its pid."""
        end = time.monotonic() + _SECONDS
        while (pids := self.pids(name)) and time.monotonic() < end:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        if pids:
            raise LaunchError(
                f"processes {pids} of machine {name} do not end. Look what holds them in /proc."
            )


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, env={**os.environ, **_SYSTEM})
    if check and done.returncode:
        raise LaunchError(
            f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}. The testbed needs a kernel that lets root "
            f"make network namespaces, veth pairs and bridges; inside a container, run that privileged."
        )
    return done.stdout


def _first_child(pid: int) -> int | None:
    with suppress(psutil.Error):
        for child in psutil.Process(pid).children():
            return child.pid
    return None


def _listens(pid: int, port: int) -> bool:
    """Whether anything listens on `port` in the network of process `pid`."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].split(":")[1], 16) == port:
                return True
    return False
