"""An image -> how Slurm runs a command in it, by pyxis (enroot) or apptainer; checked before a job is submitted."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from moe.errors import LaunchError

Runtime = Literal["pyxis", "apptainer"]
_OF_THE_HOST = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_HOME", "TMPDIR")
"""Variables that name folders which the image has elsewhere or not at all; so do those that begin with PYTHON."""


@dataclass(frozen=True)
class Container:
    """What agents and ranks run in; the supervisor stays outside, with Slurm's commands."""

    image: str
    runtime: Runtime
    python: str = "python3"
    """In the image, with turnout installed."""
    mounts: tuple[str, ...] = ()
    """Folders that are seen inside as outside, beside the working folder and the run's."""

    def command(self, folders: Sequence[str], command: Sequence[str]) -> tuple[list[str], list[str]]:
        """Options for srun, and what srun starts, so that `command` runs inside, in the first of `folders`."""
        seen = list(dict.fromkeys([*folders, *self.mounts]))
        if self.runtime == "pyxis":
            mounts = ",".join(f"{folder}:{folder}" for folder in seen)
            options = [f"--container-image={self.image}", f"--container-mounts={mounts}"]
            return [*options, f"--container-workdir={folders[0]}", "--no-container-mount-home"], list(command)
        bind = ["--bind", ",".join(seen), "--pwd", folders[0]]
        return [], ["apptainer", "exec", "--nv", *bind, self.image, *command]


def find(image: str, runtime: Runtime | None, python: str, mounts: Sequence[str]) -> Container:
    """A container that can be run from here; without a `runtime` the one that is there. Raises `LaunchError`."""
    there: dict[str, bool] = {"pyxis": _has_pyxis(), "apptainer": shutil.which("apptainer") is not None}
    chosen = runtime or next((name for name in get_args(Runtime) if there[name]), None)
    if chosen is None or not there[chosen]:
        wanted = (
            f"{chosen} is not" if chosen else "neither pyxis (srun has no --container-image) nor apptainer is"
        )
        raise LaunchError(
            f"--container is {image}, but {wanted} here. Ask the cluster which it has and give --container-runtime, "
            f"load its module first, or install turnout in a virtual environment and leave --container out."
        )
    is_file = image.endswith((".sqsh", ".sif")) or image.startswith(("/", "./"))
    if is_file and not Path(image).exists():
        raise LaunchError(
            f"--container is {image}, which is not there. Build it first: launch/Containerfile."
        )
    if strange := [mount for mount in mounts if not Path(mount).is_absolute() or set(mount) & set(",:")]:
        raise LaunchError(
            f"--container-mount is {strange[0]}: it must be the absolute path of a folder, without , or :, and is seen "
            f"inside under the same name."
        )
    return Container(str(Path(image).absolute()) if is_file else image, chosen, python, tuple(mounts))


def without_the_hosts(environment: Mapping[str, str]) -> dict[str, str]:
    """Of the variables that came with a launch those that mean the same inside."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_THE_HOST and not name.startswith("PYTHON")
    }


def _has_pyxis() -> bool:
    try:
        done = subprocess.run(["srun", "--help"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "--container-image" in done.stdout
