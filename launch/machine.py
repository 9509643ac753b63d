"""This machine -> what a run on it depends on: packages, GPUs, cores, modules, variables, room."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

PACKAGES = ("turnout", "torch", "deepspeed", "transformers", "numpy")
"""Those that must be the same on all hosts of a run."""
_VARIABLES = re.compile(
    r"(NCCL|UCX|CUDA|GLOO|OMP|MKL|TORCH|PYTORCH|FI|TRITON|DS|TURNOUT|SLURM|HIP|NVIDIA)_|LD_LIBRARY_PATH$"
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|AUTH|CREDENTIAL|OWNER", re.IGNORECASE)
_QUERY = {
    "name": "name",
    "driver": "driver_version",
    "memory": "memory.total",
    "ecc_errors": "ecc.errors.uncorrected.volatile.total",
    "hot": "clocks_throttle_reasons.hw_thermal_slowdown",
    "braked": "clocks_throttle_reasons.hw_power_brake_slowdown",
}


def versions() -> dict[str, str]:
    """Of Python and of `PACKAGES`; of the driver where there are GPUs."""
    found = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    drivers = {gpu["driver"] for gpu in gpus()}
    return found | ({"driver": "/".join(sorted(drivers))} if drivers else {})


def packages() -> dict[str, str]:
    """Every installed package with its version."""
    found = {dist.metadata["Name"]: dist.version for dist in distributions()}
    return {name: found[name] for name in sorted(found, key=str.lower) if name}


def gpus() -> list[dict[str, str]]:
    """Each by the names of `_QUERY`, as nvidia-smi says it; none where there is none."""
    said = _say("nvidia-smi", f"--query-gpu={','.join(_QUERY.values())}", "--format=csv,noheader")
    rows = [line.split(", ") for line in (said or "").splitlines()]
    return [dict(zip(_QUERY, row, strict=True)) for row in rows if len(row) == len(_QUERY)]


def gpu_faults(found: list[dict[str, str]]) -> list[str]:
    """What nvidia-smi says against them."""
    faults = []
    for number, gpu in enumerate(found):
        if gpu["ecc_errors"].isdigit() and int(gpu["ecc_errors"]):
            faults.append(
                f"GPU {number} has {gpu['ecc_errors']} uncorrected memory errors since it was reset"
            )
        if gpu["hot"] == "Active":
            faults.append(f"GPU {number} is slowed down because it is hot")
        if gpu["braked"] == "Active":
            faults.append(f"GPU {number} is slowed down because power is short")
    return faults


def topology() -> str | None:
    """How GPUs and network cards are joined, as `nvidia-smi topo -m` draws it."""
    return _say("nvidia-smi", "topo", "-m")


def commit(folder: Path) -> str | None:
    """Of the working tree in `folder`, with `-dirty` if files differ from it; None outside of git."""
    return (
        _say("git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*") or ""
    ).strip() or None


def modules(environment: Mapping[str, str]) -> list[str]:
    """What `module load` has loaded."""
    return [name for name in environment.get("LOADEDMODULES", "").split(":") if name]


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those that steer communication, devices and threads; none that looks like a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if _VARIABLES.match(name) and not _SECRET.search(name)
    }


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes(folder: Path) -> int:
    """Where `folder` is; 0 if it is not there or has no more file names."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    return 0 if status.f_files and not status.f_favail else shutil.disk_usage(folder).free


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _say(*command: str) -> str | None:
    """What it prints; None if it is not there, fails, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
