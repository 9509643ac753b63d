"""A hostfile or a list of names -> hosts that were tried: reachable, with the same Python and files, ready to start."""

import re
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.folder import LaunchFolder, Plan
from launch.start import SSH, remotely
from moe.errors import LaunchError

_SECONDS = 60.0
_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9][A-Za-z0-9.:_-]*")
"""What ssh and Slurm cannot take for an option."""


def read(given: str) -> tuple[tuple[str, ...], int | None]:
    """Hosts, and slots if the file says the same for all: `given` is a file of `HOST [slots=N]` lines or a,b,c.

    Raises `LaunchError`.
    """
    path = Path(given)
    if not path.is_file():
        if "/" in given:
            raise LaunchError(
                f"the hostfile {given} is not there. Make one with lines like `node1 slots=8`, or give names: "
                f"--hosts node1,node2."
            )
        return _unique([host.strip() for host in given.split(",") if host.strip()], given), None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"the hostfile {given} cannot be read ({error}). It must be text, with lines like `node1 slots=8`."
        ) from None
    hosts, slots = [], set()
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)(?:\s+slots=([1-9][0-9]*))?", text)
        if match is None:
            raise LaunchError(
                f"{given}, line {number}: {text!r} is no `HOST slots=N`. Correct it; slots may be left out."
            )
        hosts.append(match[1])
        slots.add(None if match[2] is None else int(match[2]))
    if len(slots) > 1:
        raise LaunchError(
            f"{given}: hosts have different numbers of slots ({', '.join(map(str, sorted(slots, key=str)))}), but "
            f"every node starts the same number of ranks. Leave some out, or give --ranks-per-node and no slots."
        )
    return _unique(hosts, given), next(iter(slots), None)


def _unique(hosts: Sequence[str], given: str) -> tuple[str, ...]:
    if not hosts:
        raise LaunchError(f"{given!r} names no host. Write at least one.")
    if strange := [host for host in hosts if _NAME.fullmatch(host) is None]:
        raise LaunchError(
            f"{given!r} names the host {strange[0]!r}, but a name begins with a letter, a digit or USER@, and goes on "
            f"with these and . : _ -. Correct it."
        )
    twice = sorted({host for host in hosts if hosts.count(host) > 1})
    if twice:
        raise LaunchError(f"{given} names {', '.join(twice)} twice: a host runs one agent. Name each once.")
    return tuple(hosts)


def check(plan: Plan, folder: LaunchFolder) -> None:
    """Go to every host and look; raises `LaunchError` with all that is wrong.

    What can be wrong: ssh, the Python, the package, the run folder not shared.
    """
    tools = ["ssh", "pdsh"] if plan.pdsh else ["ssh"]
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise LaunchError(f"{', '.join(missing)} is not installed here, but starts the agents. Install it.")
    token = secrets.token_hex(8)
    mark = folder.home / "shared"
    mark.write_text(token, encoding="utf-8")
    look = (
        "import sys, pathlib, importlib.metadata as m, launch.agent; "
        "print(sys.version.split()[0], m.version('torch'), m.version('deepspeed'), "
        "pathlib.Path(sys.argv[1]).read_text())"
    )
    command = remotely(plan, [plan.python, "-c", look, str(mark)])
    with ThreadPoolExecutor(max_workers=64) as pool:
        answers = list(pool.map(lambda host: _try(host, command), plan.hosts))
    mark.unlink(missing_ok=True)
    faults = [f"{host}: {fault}" for host, (said, fault) in zip(plan.hosts, answers, strict=True) if fault]
    faults += [
        f"{host}: it does not see {folder.run} as this machine does"
        for host, (said, fault) in zip(plan.hosts, answers, strict=True)
        if not fault and said.split()[-1] != token
    ]
    versions = {
        host: said.rpartition(" ")[0]
        for host, (said, fault) in zip(plan.hosts, answers, strict=True)
        if not fault
    }
    if len(set(versions.values())) > 1:
        faults.append(f"versions of python, torch and deepspeed differ: {versions}")
    if faults:
        raise LaunchError(
            f"not all of {len(plan.hosts)} hosts can train: {'; '.join(faults)}. "
            f"Mend them or leave them out; by hand: {shlex.join([*SSH, 'HOST', 'true'])}."
        )


def _try(host: str, command: str) -> tuple[str, str]:
    """What it says, and what is wrong."""
    try:
        done = subprocess.run(
            [*SSH, host, command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer within {_SECONDS:.0f} s"
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        return "", f"{'ssh' if done.returncode == 255 else 'python'} fails: {last}"
    return done.stdout.strip(), ""
