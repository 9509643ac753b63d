"""Command lines -> what several commands ask in the same words: a recipe, a place in Slurm, limits."""

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import click

from launch.container import Runtime, find
from launch.folder import Limits
from launch.slurm import Place
from moe.errors import LaunchError

Command = Callable[..., Any]
_LIMITS = Limits()


def recipe(command: Command) -> Command:
    """RECIPE [KEY=VALUE]... as `recipe_path` and `overrides`."""
    overrides = click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
    path = click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path))
    return path(overrides(command))


def place(command: Command) -> Command:
    """Slurm's options, as one `place`."""
    return _gathered(
        command,
        "place",
        Place,
        click.option("--partition", help="Slurm's, as the next."),
        click.option("--account"),
        click.option("--qos"),
        click.option("--constraint"),
        click.option("--exclude", help="Nodes to leave out."),
    )


def container(command: Command) -> Command:
    """The options of a container, as one `container`, which is found and checked; None without an image."""

    @functools.wraps(command)
    def gathered(
        *arguments: Any,
        image: str | None,
        runtime: Runtime | None,
        mounts: tuple[str, ...],
        container_python: str,
        **given: Any,
    ) -> Any:
        if image is None and (runtime or mounts):
            raise LaunchError(
                "--container-runtime and --container-mount say how, but there is no --container."
            )
        found = None if image is None else find(image, runtime, container_python, mounts)
        return command(*arguments, **given, container=found)

    wrapped: Command = gathered
    for option in (
        click.option(
            "--container-python", default="python3", show_default=True, help="In the image, with turnout."
        ),
        click.option("--container-mount", "mounts", multiple=True, help="A folder seen inside as outside."),
        click.option(
            "--container-runtime",
            "runtime",
            type=click.Choice(get_args(Runtime)),
            help="Not given: the one that is there.",
        ),
        click.option(
            "--container", "image", help="Slurm: an image to run ranks in, as its runtime names it."
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


def limits(command: Command) -> Command:
    """Seconds, as one `limits`."""
    return _gathered(
        command,
        "limits",
        Limits,
        _seconds("--agent-limit", "agent_seconds", "Seconds for a node's agent to begin.", 1),
        _seconds("--boot-limit", "boot_seconds", "Seconds to the first step.", 1),
        _seconds("--hang-limit", "hang_seconds", "Seconds a step may take, with its evaluation or save.", 1),
        _seconds(
            "--lease",
            "lease_seconds",
            "Seconds of silence after which a node counts as lost, or ranks end themselves.",
            2,
        ),
    )


def _seconds(name: str, field: str, said: str, least: float) -> Callable[[Command], Command]:
    default = getattr(_LIMITS, field)
    return click.option(
        name, field, type=click.FloatRange(min=least), default=default, show_default=True, help=said
    )


def _gathered(
    command: Command, name: str, kind: type[Any], *options: Callable[[Command], Command]
) -> Command:
    """`command` gets one `name` of `kind`, a dataclass, instead of the options one by one."""
    wanted = {field.name for field in fields(kind)}

    @functools.wraps(command)
    def gathered(*arguments: Any, **given: Any) -> Any:
        mine = {key: given.pop(key) for key in sorted(wanted & given.keys())}
        return command(*arguments, **given, **{name: kind(**mine)})

    wrapped: Command = gathered
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped
