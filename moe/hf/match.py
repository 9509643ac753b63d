"""A model's switches -> the row of the table that has them, or the switches that would give it one."""

import json
from collections.abc import Collection

from moe.config import ModelConfig, Section
from moe.errors import ExportError
from moe.hf.families import FAMILIES
from moe.hf.family import NEUTRAL, SET, Family, meets, setting

NEAREST = 6
"""Architectures that a refusal names."""


def family_of(model: ModelConfig) -> Family:
    """The row whose needs the model meets, or of several the one it names.

    Raises `ExportError` naming the switches that would give it one.
    """
    kin = [family for family in FAMILIES if family.sparse == (model.moe is not None)]
    if model.architecture is not None:
        kin = [_named(model.architecture)]
    lacking = {family.model_type: differences(family, model) for family in kin}
    for family in kin:
        if not lacking[family.model_type]:
            return family
    ways = sorted(lacking.items(), key=lambda item: len(item[1]))
    what = model.architecture or "stock architecture"
    raise ExportError(
        f"this model {'is' if model.architecture else 'has'} no {what}, so nothing outside could load it: "
        f"{_spoken(kin, model)}. {_why(model)}Change it to one of\n"
        + "\n".join(f"       {model_type}: {', '.join(changes)}" for model_type, changes in ways[:NEAREST])
    )


def differences(family: Family, model: ModelConfig) -> list[str]:
    """What the model would have to change: what the row needs, and switches that it has no word for."""
    spoken = family.paths
    neutral = {path: value for path, value in NEUTRAL.items() if path not in spoken}
    if family.sparse != (model.moe is not None):
        return ["the section model.moe" if family.sparse else "model.moe=null"]
    found = [
        f"model.{path}={_word(value)}"
        for path, value in {**family.needs, **neutral}.items()
        if _applies(model, path) and not meets(model, path, value)
    ]
    for part in family.parts:
        if _there(model, part.paths):
            found += part.lacking(model)
    return found


def _named(architecture: str) -> Family:
    for family in FAMILIES:
        if family.model_type == architecture:
            return family
    raise ExportError(
        f"model.architecture is {architecture!r}, which is not in the table of architectures. There are "
        f"{', '.join(sorted(family.model_type for family in FAMILIES))}."
    )


def check_exportable(model: ModelConfig) -> None:
    """Raise `ExportError` if no stock architecture equals the model."""
    family_of(model)


def _applies(model: ModelConfig, path: str) -> bool:
    """A switch below a block that is not there says nothing."""
    return "." not in path or setting(model, path.rpartition(".")[0]) is not None


def _there(model: ModelConfig, paths: Collection[str]) -> bool:
    return all(_applies(model, path) for path in paths)


def _spoken(kin: list[Family], model: ModelConfig) -> str:
    """The model's values of all switches that a row of its kind needs, and of others that are not neutral."""
    paths = dict.fromkeys(path for family in kin for path in family.needs if path != "moe")
    paths |= dict.fromkeys(
        path for path, value in NEUTRAL.items() if path != "moe" and not meets(model, path, value)
    )
    return ", ".join(f"model.{path}={_word(setting(model, path))}" for path in paths if _applies(model, path))


def _why(model: ModelConfig) -> str:
    if model.moe is None or model.moe.router_choice == "token":
        return ""
    return "In all stock architectures each token chooses its experts. "


def _word(value: object) -> str:
    if value is SET:
        return "WIDTH"
    return json.dumps(value.model_dump() if isinstance(value, Section) else value)
