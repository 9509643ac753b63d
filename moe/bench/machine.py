"""Where a comparison ran, and with which allocator: glibc reads its settings once, when a process starts."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moe.errors import ConfigError

ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {
        "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
        "MALLOC_TOP_PAD_": str(256 << 20),
    },
}
"""glibc's own settings, and those that keep freed pages instead of asking the kernel for zeroed ones each time."""

_TELLING = (
    "MALLOC_",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "ONEDNN_",
    "CUDA_",
    "TORCH_",
)


def restart_with(allocator: str, module: str, arguments: Sequence[str]) -> None:
    """Start this process anew as `python -m module` if its environment does not have `allocator`'s settings."""
    if allocator in ALLOCATORS and _settings(os.environ) != ALLOCATORS[allocator]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        command = [sys.executable, "-m", module, *arguments]
        os.execve(sys.executable, command, {**kept, **ALLOCATORS[allocator]})  # noqa: S606  no shell


def keep_kernels() -> None:
    """Let oneDNN, which reads this at its first product, keep the kernels of all contenders, not the last 1024.

    Each makes hundreds of its own in bf16, and would take the others' away, as none does that runs alone.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")


def check_allocator(allocator: str, device: torch.device) -> None:
    """Raises `ConfigError`: settings that this process does not have, or that would have no effect."""
    if _settings(os.environ) != ALLOCATORS[allocator]:
        raise ConfigError(
            f"--allocator is {allocator}, but this process runs with {_settings(os.environ) or 'no settings'}, "
            f"which it read when it started. Run python -m moe.bench.layer as a command of its own."
        )
    if allocator == "default":
        return
    if device.type != "cpu":
        raise ConfigError(
            "--allocator is about memory on CPU, so it has no effect with --device cuda. Leave it out."
        )
    if platform.libc_ver()[0] != "glibc":
        raise ConfigError(
            f"--allocator is {allocator}, which is a set of glibc's settings, but Python here runs on another C "
            f"library. Leave it out."
        )


def describe(device: torch.device, allocator: str) -> dict[str, Any]:
    """What a reader of the figures needs to know of the machine, before work on it begins."""
    packages = ("torch", "transformers", "deepspeed", "turnout")
    return {
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "allocator": allocator,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_TELLING)
        },
    }


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("MALLOC_")}


def _cpu_model() -> str:
    page = Path("/proc/cpuinfo")
    lines = page.read_text(encoding="utf-8").splitlines() if page.is_file() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())
