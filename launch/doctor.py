"""`turnout doctor`: the hosts of a run to be -> a table of what they are, what is wrong, and which to leave out."""

import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import click

from launch import allocation, diagnosis, machine, options, slurm
from launch import hosts as host_names
from launch.diagnosis import Finding, Pair, Wanted
from launch.folder import Kind, Plan
from launch.start import remotely
from launch.visits import Fault, Visit, ask, clock
from moe.errors import LaunchError

_LOCAL = "this machine"
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")
_QUEUE_SECONDS = 60.0
_PROBE = ("-u", "-m", "launch.probe")


@dataclass
class Examination:
    """What was found so far, and on which hosts more can be asked."""

    visits: list[Visit]
    findings: list[Finding]
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)
    computing: dict[str, dict[str, Any]] = field(default_factory=dict)
    by_pair: dict[Pair, float] = field(default_factory=dict)
    among_all: dict[str, float] = field(default_factory=dict)

    def ask(self, question: str, given: Callable[[int], Mapping[str, Any]] = lambda _: {}) -> dict[str, Any]:
        """Who does not answer is a finding, and is asked no more."""
        said = ask(self.visits, question, given)
        for visit in self.visits:
            answer = said[visit.host]
            if isinstance(answer, Fault):
                self.findings.append(Finding(visit.host, answer.what))
        self.visits = [visit for visit in self.visits if not isinstance(said[visit.host], Fault)]
        return {visit.host: said[visit.host] for visit in self.visits}


@click.command()
@click.option(
    "--on", "kind", type=click.Choice(get_args(Kind)), help="Not given: hosts if there are --hosts."
)
@click.option("--hosts", "given", help="A hostfile or names: a,b,c. Slurm: of its nodes; not given: all.")
@click.option("--nodes", type=click.IntRange(min=1), help="Slurm: look at so many that are free.")
@click.option(
    "--gpus-per-node", type=click.IntRange(min=1), help="Slurm: to ask for, so that they are tried."
)
@options.place
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path(),
    show_default=True,
    help="Where runs will be: it must be there, and writable, on every host.",
)
@click.option("--free", "gigabytes", type=click.FloatRange(min=0), default=1.0, show_default=True, help="GB.")
@click.option("--port", "ports", type=click.IntRange(1, 65535), multiple=True, help="That must be free.")
@click.option(
    "--bandwidth", type=click.FloatRange(min=0), default=0.0, help="MB/s that every link must have."
)
def command(
    kind: Kind | None,
    given: str | None,
    nodes: int | None,
    gpus_per_node: int | None,
    place: slurm.Place,
    folder: Path,
    gigabytes: float,
    ports: tuple[int, ...],
    bandwidth: float,
) -> None:
    """Look at hosts before a long run, and say which to leave out.

    Versions, GPUs, clock, folder, room, ports, scratch folders, old locks; a short matmul on every device; connections
    and bandwidth between each two, over NCCL with GPUs, else gloo. With --on slurm in a job: at its nodes; else a job
    is started for it.

    Exit code 0 if nothing is wrong, else 1; the last line names the hosts to leave out.
    """
    kind = kind or ("local" if given is None else "hosts")
    named = () if given is None else host_names.read(given)[0]
    wanted = Wanted(gigabytes * 1e9, bandwidth)
    hosts, findings = named, list[Finding]()
    if kind == "local":
        hosts = (_LOCAL,)
    elif kind == "hosts":
        if not named:
            raise LaunchError("--on hosts needs to know them: give --hosts HOSTFILE or --hosts a,b,c.")
        if shutil.which("ssh") is None:
            raise LaunchError("ssh is not installed here, but doctor goes to the hosts with it. Install it.")
    else:
        hosts, findings = _slurm_nodes(named, nodes, place)
    with _probes(kind, hosts, place, gpus_per_node or 0) as visits:
        found = Examination(visits, findings)
        _look(found, folder.absolute(), ports, wanted)
        _try(found, wanted)
    for line in _table(hosts, found):
        click.echo(line)
    for finding in found.findings:
        click.echo(f"{finding.host}: {finding.what}")
    bad = list(dict.fromkeys(f.host for f in found.findings if f.host not in (diagnosis.ALL, _LOCAL)))
    if bad:
        click.echo(f"leave out: {','.join(bad)}")
    else:
        click.echo("leave out none: mend what is wrong" if found.findings else "nothing is wrong")
    sys.exit(1 if found.findings else 0)


def _slurm_nodes(
    named: Sequence[str], number: int | None, place: slurm.Place
) -> tuple[tuple[str, ...], list[Finding]]:
    """Those to look at, and what Slurm itself has against the others. Raises `LaunchError`."""
    if "SLURM_JOB_ID" in os.environ:
        mine = slurm.Job.mine().nodes
        return tuple(node for node in mine if not named or node in named), []
    known = allocation.nodes(place)
    if not known:
        where = place.partition or "any partition"
        raise LaunchError(
            f"Slurm has no node in {where}{' but those excluded' if place.exclude else ''}. Ask sinfo for its "
            f"partitions, and name one by --partition."
        )
    if strange := [name for name in named if name not in known]:
        raise LaunchError(
            f"Slurm has no node {', '.join(strange)} there. Use some of {', '.join(known) or 'another partition'}."
        )
    asked = {name: known[name] for name in named or known}
    out = [
        Finding(name, f"Slurm has it {node.state}: {node.reason}")
        for name, node in asked.items()
        if node.is_out
    ]
    free = [name for name, node in asked.items() if node.is_free]
    if busy := [name for name, node in asked.items() if not node.is_out and not node.is_free]:
        click.echo(f"busy, so not looked at: {','.join(busy)}")
    if number is not None and len(free) < number:
        raise LaunchError(f"--nodes is {number}, but {len(free)} are free. Ask sinfo, or use fewer.")
    return tuple(free[:number]), out


@contextmanager
def _probes(kind: Kind, hosts: Sequence[str], place: slurm.Place, gpus: int) -> Iterator[list[Visit]]:
    """One on each host, until the end."""
    plan = Plan(kind, "", str(Path.cwd()), sys.executable, len(hosts), 1)
    probe = [plan.python, *_PROBE]
    job, ours = os.environ.get("SLURM_JOB_ID", ""), False
    if kind == "slurm" and hosts and not job:
        job, ours = allocation.hold(hosts, place, gpus, _QUEUE_SECONDS), True
    visits: list[Visit] = []
    try:
        for host in hosts:
            there = {
                "local": probe,
                "hosts": [*_SSH, host, remotely(plan, probe)],
                "slurm": [*allocation.step(job, host), *probe],
            }
            visits.append(Visit.begin(host, there[kind]))
        yield list(visits)
    finally:
        for visit in visits:
            visit.dismiss()
        for visit in visits:
            visit.end()
        if ours:
            slurm.cancel(job)


def _look(found: Examination, folder: Path, ports: Sequence[int], wanted: Wanted) -> None:
    """What each host says of itself."""
    mark = folder / f".turnout-doctor-{secrets.token_hex(4)}"
    text = secrets.token_hex(8)
    try:
        try:
            mark.write_text(text)
            seen_here = True
        except OSError:
            seen_here = False  # what it is, the hosts find out as well
        many = len(found.visits) > 1
        given = {"folder": str(folder), "ports": list(ports), "many": many}
        found.seen = found.ask("look", lambda _: given | {"mark": f"{mark}:{text}" if seen_here else None})
    finally:
        mark.unlink(missing_ok=True)
    for visit in found.visits:
        offset = clock(visit)
        if isinstance(offset, Fault):
            found.findings.append(Finding(visit.host, offset.what))
            del found.seen[visit.host]
        else:
            found.seen[visit.host] |= dict(zip(("clock", "clock_error"), offset, strict=True))
    found.visits = [visit for visit in found.visits if visit.host in found.seen]
    found.findings += diagnosis.diagnose(found.seen, machine.versions(), wanted)


def _try(found: Examination, wanted: Wanted) -> None:
    """How fast they compute, whether they reach each other, and how fast."""
    found.computing = found.ask("compute")
    if diagnosis.computing(found.computing):  # accused only of what it does twice: others may have been busy
        found.computing = diagnosis.better(found.computing, found.ask("compute"))
    found.findings += diagnosis.computing(found.computing)
    if len(found.visits) < 2:
        return
    doors = found.ask("door")
    closed = diagnosis.doors(found.ask("reach", lambda _: {"doors": doors}))
    found.findings += closed
    shut = {finding.host for finding in closed}
    found.visits = [visit for visit in found.visits if visit.host not in shut]
    for _ in range(2):  # likewise
        if len(found.visits) < 2 or not _measure(found):
            return
        slow = diagnosis.speeds([visit.host for visit in found.visits], found.by_pair, wanted)
        if not slow:
            return
    found.findings += slow


def _measure(found: Examination) -> bool:
    """Bandwidths, the best of what is known; False if that fails."""
    hosts = [visit.host for visit in found.visits]
    cuda = all("gpu" in found.computing[host] for host in hosts)
    port = 20000 + secrets.randbelow(10000)
    before = len(found.findings)
    said = found.ask(
        "bandwidth",
        lambda node: {"node": node, "nodes": len(hosts), "address": hosts[0], "port": port, "cuda": cuda},
    )
    faults = found.findings[before:]
    if faults:
        way = "NCCL" if cuda else "gloo"
        where = [diagnosis.ALL] if len(faults) == len(hosts) else [fault.host for fault in faults]
        found.findings[before:] = [
            Finding(host, f"{way} fails: {fault.what}") for host, fault in zip(where, faults, strict=False)
        ]
        return False
    for node, host in enumerate(hosts):
        for other, speed in said[host]["pairs"].items():
            pair = (host, hosts[int(other)])
            found.by_pair[pair] = max(speed, found.by_pair.get(pair, 0.0))
        for name in ("all_reduce", "all_to_all"):
            slowest = min(said[one][name] for one in hosts)
            found.among_all[name] = (
                max(slowest, found.among_all.get(name, 0.0)) if node == 0 else found.among_all[name]
            )
    return True


def _table(hosts: Sequence[str], found: Examination) -> Iterator[str]:
    for host in hosts:
        said = found.seen.get(host)
        if said is None:
            yield f"{host:<16} no answer"
            continue
        versions = " ".join(f"{name} {number}" for name, number in said["versions"].items())
        computing = found.computing.get(host, {})
        speeds = computing.get("gpu") or computing.get("cpu")
        devices = f"{len(said['gpus'])} GPUs" if computing.get("gpu") else "CPU"
        compute = f", {devices} {min(speeds):.3g} to {max(speeds):.3g} TFLOP/s" if speeds else ""
        mine = [speed for pair, speed in found.by_pair.items() if host in pair]
        link = f", links {min(mine):.0f} to {max(mine):.0f} MB/s" if mine else ""
        yield (
            f"{host:<16} {versions}, clock {said['clock']:+.2f} s, {said['free_bytes'] / 1e9:.1f} GB free"
            f"{compute}{link}"
        )
    if found.among_all:
        reduce, exchange = found.among_all["all_reduce"], found.among_all["all_to_all"]
        yield f"among all: all-reduce {reduce:.0f} MB/s, all-to-all {exchange:.0f} MB/s of what each host gives"
