"""Command lines -> what several commands ask in the same words: a recipe, a place in Slurm, limits."""

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from launch.folder import Limits
from launch.slurm import Place

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


def limits(command: Command) -> Command:
    """Seconds, as one `limits`."""
    return _gathered(
        command,
        "limits",
        Limits,
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
