"""`turnout doctor`: the hosts of a run to be -> a table of what they are, what is wrong, and which to leave out."""

import json
import secrets
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from launch import hosts as host_names
from launch.folder import Plan
from launch.start import SSH, remotely
from moe.errors import LaunchError

Seen = Mapping[str, Mapping[str, Any]]
_LOCAL = "this machine"
_SECONDS = 60.0
_CLOCK_SECONDS = 2.0
_SLOW = 0.25
"""Of the median of every host's fastest link: a host whose own is slower has a bad one."""


@dataclass(frozen=True)
class Finding:
    """Something wrong with a host."""

    host: str
    what: str


def diagnose(seen: Seen, speeds: Mapping[tuple[str, str], float], least_bytes: int) -> list[Finding]:
    """What hosts say of themselves and each other -> what is wrong with which. Pure.

    A host with the key `fault` did not answer. `speeds`: MB/s by pair of hosts.
    """
    found = [Finding(host, said["fault"]) for host, said in seen.items() if "fault" in said]
    well = {host: said for host, said in seen.items() if "fault" not in said}
    for name in sorted({name for said in well.values() for name in said["versions"]}):
        have = {host: said["versions"].get(name) for host, said in well.items()}
        usual = statistics.mode(have.values())
        found += [
            Finding(host, f"{name} is {mine}, but {usual} elsewhere")
            for host, mine in have.items()
            if mine != usual
        ]
    middle = statistics.median_low([said["clock"] for said in well.values()] or [0.0])
    for host, said in well.items():
        if abs(said["clock"] - middle) > _CLOCK_SECONDS + said["clock_error"]:
            found.append(Finding(host, f"its clock is off by {said['clock'] - middle:+.1f} s"))
        if said["folder_fault"]:
            found.append(Finding(host, said["folder_fault"]))
        elif said["free_bytes"] < least_bytes:
            free, wanted = said["free_bytes"] / 1e9, least_bytes / 1e9
            found.append(Finding(host, f"{free:.2f} GB are free, but {wanted:.2f} GB are wanted"))
        found += [Finding(host, f"port {port} is taken") for port in said["taken"]]
    fastest = {host: max((mb for pair, mb in speeds.items() if host in pair), default=0.0) for host in well}
    usual_speed = statistics.median_high(fastest.values()) if speeds else 0.0
    for host, speed in fastest.items():
        if speed < _SLOW * usual_speed:
            found.append(Finding(host, f"its fastest link has {speed:.0f} MB/s, {usual_speed:.0f} is usual"))
    return found


@click.command()
@click.option("--hosts", "given", help="A hostfile or names: a,b,c. Not given: this machine alone.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path(),
    show_default=True,
    help="Where runs will be: it must be there, and writable, on every host.",
)
@click.option("--free", "gigabytes", type=click.FloatRange(min=0), default=1.0, show_default=True, help="GB.")
@click.option("--port", "ports", type=click.IntRange(1, 65535), multiple=True, help="That must be free.")
def command(given: str | None, folder: Path, gigabytes: float, ports: tuple[int, ...]) -> None:
    """Look at hosts before a long run: versions, clock, folder, room, ports, and bandwidth between each two.

    Exit code 0 if nothing is wrong, else 1; the last line names the hosts to leave out.
    """
    names = host_names.read(given)[0] if given is not None else (_LOCAL,)
    if given is not None and shutil.which("ssh") is None:
        raise LaunchError("ssh is not installed here, but doctor goes to the hosts with it. Install it.")
    plan = Plan("hosts", str(folder.absolute()), str(Path.cwd()), sys.executable, len(names), 1, names)
    seen = _look(plan, folder.absolute(), ports)
    well = [name for name in names if "fault" not in seen[name]]
    speeds, faults = _speeds(plan, well) if len(well) > 1 else ({}, [])
    findings = [*diagnose(seen, speeds, int(gigabytes * 1e9)), *faults]
    for line in _table(seen, speeds):
        click.echo(line)
    for finding in findings:
        click.echo(f"{finding.host}: {finding.what}")
    bad = [name for name in names if name in {finding.host for finding in findings}]
    click.echo(f"leave out: {','.join(bad)}" if bad else "nothing is wrong")
    sys.exit(1 if bad else 0)


def _look(plan: Plan, folder: Path, ports: Sequence[int]) -> dict[str, dict[str, Any]]:
    """By host what `launch.probe look` says there, its clock's offset from here, and how sure that is."""
    home = folder / f".turnout-doctor-{secrets.token_hex(4)}"
    mark = secrets.token_hex(8)
    try:
        home.mkdir()
    except OSError as error:
        raise LaunchError(
            f"--folder is {folder}, which cannot be written here ({error.strerror}). Give the folder of runs."
        ) from None
    try:
        (home / "mark").write_text(mark)
        words = ["look", str(home), mark, *map(str, ports)]
        with ThreadPoolExecutor(max_workers=64) as pool:
            return dict(
                zip(plan.hosts, pool.map(lambda host: _ask(plan, host, words), plan.hosts), strict=True)
            )
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _ask(plan: Plan, host: str, words: Sequence[str]) -> dict[str, Any]:
    with _probe(plan, host, words) as process:
        timer = threading.Timer(_SECONDS, process.kill)
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            said: dict[str, Any] = json.loads(process.stdout.readline())
            asked = time.time()
            process.stdin.write("now\n")
            process.stdin.flush()
            theirs, here = float(process.stdout.readline()), time.time()
            return said | {"clock": theirs - (asked + here) / 2, "clock_error": (here - asked) / 2}
        except (OSError, ValueError):
            process.kill()
            assert process.stderr is not None
            lines = process.stderr.read().strip().splitlines()
            return {"fault": f"it does not answer: {lines[-1] if lines else 'no word'}"}
        finally:
            timer.cancel()


def _speeds(plan: Plan, hosts: Sequence[str]) -> tuple[dict[tuple[str, str], float], list[Finding]]:
    """MB/s by pair of hosts, and hosts that could not take part."""
    port = 20000 + secrets.randbelow(10000)
    probes = [
        _probe(plan, host, ["speed", str(node), str(len(hosts)), hosts[0], str(port)])
        for node, host in enumerate(hosts)
    ]
    end = time.monotonic() + _SECONDS + 2 * len(hosts)
    speeds: dict[tuple[str, str], float] = {}
    faults: list[Finding] = []
    for host, process in zip(hosts, probes, strict=True):
        try:
            said, errors = process.communicate(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said, errors = process.communicate()
        if process.returncode:
            last = (errors.strip() or "no answer in time").splitlines()[-1]
            faults.append(Finding(host, f"gloo fails: {last}"))
            continue
        found: dict[str, float] = json.loads(said.strip().splitlines()[-1])
        speeds |= {(host, hosts[int(other)]): speed for other, speed in found.items()}
    return speeds, faults


def _probe(plan: Plan, host: str, words: Sequence[str]) -> "subprocess.Popen[str]":
    command = [plan.python, "-m", "launch.probe", *words]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    there = command if host == _LOCAL else [*SSH, host, remotely(plan, command)]
    return subprocess.Popen(there, text=True, **pipes)


def _table(seen: Seen, speeds: Mapping[tuple[str, str], float]) -> list[str]:
    lines = []
    for host, said in seen.items():
        if "fault" in said:
            lines.append(f"{host:<16} no answer")
            continue
        versions = " ".join(f"{name} {number}" for name, number in said["versions"].items())
        mine = [speed for pair, speed in speeds.items() if host in pair]
        link = f", {min(mine):.0f} to {max(mine):.0f} MB/s" if mine else ""
        lines.append(
            f"{host:<16} {versions}, clock {said['clock']:+.2f} s, {said['free_bytes'] / 1e9:.1f} GB free{link}"
        )
    return lines
