"""What an attempt ran in -> a page beside it, and in words what is different from the attempt before."""

import platform
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch import machine
from launch.folder import Attempt, LaunchFolder, Plan, read, write

Page = Mapping[str, Any]
_NAMED = 6
"""So many changes are named; of the others there is the number."""


def capture(plan: Plan, attempt: Attempt, environment: Mapping[str, str]) -> dict[str, Any]:
    """As the first node has it, with the `environment` that its ranks get."""
    return {
        "host": platform.node(),
        "nodes": attempt.nodes,
        "ranks_per_node": plan.ranks_per_node,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": machine.cores(),
        "commit": machine.commit(Path(__file__).parent),
        "working_folder": plan.working_folder,
        "working_folder_commit": machine.commit(Path(plan.working_folder)),
        "packages": machine.packages(),
        "modules": machine.modules(environment),
        "variables": machine.variables(environment),
        "gpus": machine.gpus(),
        "topology": machine.topology(),
    }


def record(folder: LaunchFolder, plan: Plan, attempt: Attempt, environment: Mapping[str, str]) -> None:
    """Write the page; a file system that does not take it is somebody else's to judge."""
    with suppress(OSError):
        write(_path(folder, attempt.number), capture(plan, attempt, environment))


def record_beside(*what: Any) -> None:
    """As `record`, in a thread: nvidia-smi can take seconds."""
    threading.Thread(target=record, args=what, daemon=True).start()


def of(folder: LaunchFolder, number: int) -> Page | None:
    """An attempt's page, if it came so far."""
    return read(_path(folder, number))


def differences(before: Page, after: Page) -> Iterator[str]:
    """What may matter to the run's numbers or speed, in words."""
    for name in (
        "python",
        "system",
        "cores",
        "commit",
        "working_folder",
        "working_folder_commit",
        "ranks_per_node",
    ):
        if before.get(name) != after.get(name):
            yield f"{name.replace('_', ' ')}: {_short(before.get(name))} -> {_short(after.get(name))}"
    if len(before["nodes"]) != len(after["nodes"]):
        yield f"nodes: {len(before['nodes'])} -> {len(after['nodes'])}"
    yield from _changes(before["packages"], after["packages"])
    if before["modules"] != after["modules"]:
        yield f"modules: {' '.join(before['modules']) or 'none'} -> {' '.join(after['modules']) or 'none'}"
    yield from _changes(_steady(before["variables"]), _steady(after["variables"]))
    models = [
        sorted(f"{gpu['name']}, driver {gpu['driver']}" for gpu in page["gpus"]) for page in (before, after)
    ]
    if models[0] != models[1]:
        was, now = (f"{len(found)} x {found[0]}" if found else "none" for found in models)
        yield f"GPUs of the first node: {was} -> {now}"


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    for name in changed[:_NAMED]:
        yield f"{name} {_short(before.get(name))} -> {_short(after.get(name))}"
    if len(changed) > _NAMED:
        yield f"and {len(changed) - _NAMED} more like these"


def _steady(variables: Mapping[str, str]) -> dict[str, str]:
    """Without those that are another in every job or step."""
    return {name: value for name, value in variables.items() if not name.startswith(("SLURM_", "TURNOUT_"))}


def _short(value: object) -> str:
    return "not there" if value is None else str(value)[:60]


def _path(folder: LaunchFolder, number: int) -> Path:
    return folder.attempt_folder(number) / "environment.json"
