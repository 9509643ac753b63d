"""What hosts say of themselves and of each other -> what is wrong with which. Pure."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Said = Mapping[str, Any]
Pair = tuple[str, str]
ALL = "all hosts"
_CLOCK_SECONDS = 2.0
_SLOW = 0.25
"""Of the median of all hosts: a host slower than that, to compute or at its fastest link, is not as it should be."""


@dataclass(frozen=True)
class Finding:
    """Something wrong with a host, or with all of them."""

    host: str
    what: str


@dataclass(frozen=True)
class Wanted:
    """What hosts need, beside being alike."""

    free_bytes: float = 1e9
    megabytes_per_second: float = 0.0
    """Of every link; 0: what is usual is good enough."""


def diagnose(seen: Mapping[str, Said], here: Mapping[str, str], wanted: Wanted) -> list[Finding]:
    """From what each host says of itself, those that do not answer left out. `here`: versions on this machine."""
    findings = [
        *_versions(seen, here),
        *_clocks(seen),
        *_folders(seen, wanted),
        *(
            Finding(host, what)
            for host, said in seen.items()
            for what in [*(f"port {port} is taken" for port in said["taken"]), *said["faults"]]
        ),
        *_gpus(seen),
    ]
    return _together(findings, seen)


def speeds(seen: Sequence[str], by_pair: Mapping[Pair, float], wanted: Wanted) -> list[Finding]:
    """From MB/s by pair of hosts: the host behind the slow links, or else both ends of one."""
    if not by_pair:
        return []
    fastest = {host: max((mb for pair, mb in by_pair.items() if host in pair), default=0.0) for host in seen}
    usual = statistics.median_high(fastest.values())
    slow = [
        host for host, speed in fastest.items() if speed < max(_SLOW * usual, wanted.megabytes_per_second)
    ]
    found = [
        Finding(host, f"its fastest link has {fastest[host]:.0f} MB/s, {usual:.0f} is usual") for host in slow
    ]
    for (one, other), speed in by_pair.items():
        if speed < max(_SLOW * usual, wanted.megabytes_per_second) and not {one, other} & set(slow):
            found.append(Finding(one, f"its link to {other} has {speed:.0f} MB/s, {usual:.0f} is usual"))
            found.append(Finding(other, f"its link to {one} has {speed:.0f} MB/s, {usual:.0f} is usual"))
    return found


def doors(closed: Mapping[str, Sequence[str]]) -> list[Finding]:
    """From the hosts that each cannot connect to: whom most cannot reach, or who cannot reach most; else both ends."""
    pairs = {(host, other) for host, others in closed.items() for other in others}
    found = []
    while pairs:
        count = {host: sum(host in pair for pair in pairs) for pair in pairs for host in pair}
        worst = [host for host in sorted(count) if count[host] == max(count.values())]
        for host in worst:
            others = sorted({end for pair in pairs if host in pair for end in pair} - {host})
            found.append(Finding(host, f"no connection between it and {', '.join(others)}"))
        pairs = {pair for pair in pairs if not set(pair) & set(worst)}
    return found


def computing(said: Mapping[str, Said]) -> list[Finding]:
    """From TFLOP/s by device: those that are wrong, or far slower than what is usual for their kind."""
    found = []
    for kind in ("gpu", "cpu"):
        speed = [
            (host, number, s) for host, one in said.items() for number, s in enumerate(one.get(kind, []))
        ]
        usual = statistics.median_high([s for _, _, s in speed] or [0.0])
        for host, number, s in speed:
            name = f"GPU {number}" if kind == "gpu" else "its CPU"
            if s == 0:
                found.append(Finding(host, f"{name} gets a product of matrices wrong"))
            elif s < _SLOW * usual:
                found.append(Finding(host, f"{name} does {s:.3g} TFLOP/s, {usual:.3g} is usual"))
    return found + list(
        _odd({host: one.get("nccl", "not there") for host, one in said.items()}, "NCCL", None)
    )


def better(one: Mapping[str, Said], other: Mapping[str, Said]) -> dict[str, dict[str, Any]]:
    """Of two tries to compute the faster, device by device; but what was wrong once is wrong."""
    return {
        host: {
            **said,
            **{
                kind: [min(pair) and max(pair) for pair in zip(one[host][kind], said[kind], strict=True)]
                for kind in ("gpu", "cpu")
                if kind in said
            },
        }
        for host, said in other.items()
    }


def _versions(seen: Mapping[str, Said], here: Mapping[str, str]) -> Iterator[Finding]:
    for name in sorted({name for said in seen.values() for name in said["versions"]}):
        have = {host: said["versions"].get(name, "not there") for host, said in seen.items()}
        yield from _odd(have, name, here.get(name))


def _gpus(seen: Mapping[str, Said]) -> Iterator[Finding]:
    have = {
        host: ", ".join(f"{said['gpus'].count(name)} x {name}" for name in dict.fromkeys(said["gpus"]))
        or "none"
        for host, said in seen.items()
    }
    yield from _odd(have, "GPUs", None)


def _odd(have: Mapping[str, str], name: str, here: str | None) -> Iterator[Finding]:
    """Who has something else than most; of two opinions equally common, this machine's counts."""
    votes = [*have.values(), *([here] if here is not None else [])]
    usual = max(votes, key=lambda vote: (votes.count(vote), vote == here), default="")
    for host, mine in have.items():
        if mine != usual:
            yield Finding(host, f"{name}: {mine} here, but {usual} elsewhere")


def _clocks(seen: Mapping[str, Said]) -> Iterator[Finding]:
    middle = statistics.median_low([0.0, *(said["clock"] for said in seen.values())])  # 0: this machine's
    for host, said in seen.items():
        if abs(said["clock"] - middle) > _CLOCK_SECONDS + said["clock_error"]:
            yield Finding(host, f"its clock is off by {said['clock'] - middle:+.1f} s")


def _folders(seen: Mapping[str, Said], wanted: Wanted) -> Iterator[Finding]:
    for host, said in seen.items():
        if said["folder_fault"]:
            yield Finding(host, said["folder_fault"])
        elif said["free_bytes"] < wanted.free_bytes:
            free, least = said["free_bytes"] / 1e9, wanted.free_bytes / 1e9
            yield Finding(host, f"the folder has {free:.2f} GB free, but {least:.2f} GB are wanted")


def _together(findings: Sequence[Finding], seen: Mapping[str, Said]) -> list[Finding]:
    """What is wrong on every one of several hosts is no host's fault."""
    hosts = {what: {f.host for f in findings if f.what == what} for what in {f.what for f in findings}}
    common = {what for what, where in hosts.items() if len(where) == len(seen) > 1}
    shared = [Finding(ALL, what) for what in dict.fromkeys(f.what for f in findings) if what in common]
    return [*shared, *(finding for finding in findings if finding.what not in common)]
