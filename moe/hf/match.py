"""A model's switches -> the row of the table that has them, or the switches that would give it one."""

import json

from moe.config import ModelConfig
from moe.errors import ExportError
from moe.hf.families import FAMILIES, SET, Family, setting


def family_of(model: ModelConfig) -> Family:
    """The row whose needs the model meets; raises `ExportError` naming the switches that would give it one."""
    kin = [family for family in FAMILIES if _meets(model, "moe", family.needs["moe"])]
    lacking = {family.model_type: differences(family, model) for family in kin}
    for family in kin:
        if not lacking[family.model_type]:
            return family
    ways = sorted(lacking.items(), key=lambda item: len(item[1]))
    raise ExportError(
        f"this model has no stock architecture, so nothing outside could load it: {_spoken(kin, model)}. "
        f"{_why(model)}Change it to one of\n"
        + "\n".join(f"       {model_type}: {', '.join(changes)}" for model_type, changes in ways)
    )


def check_exportable(model: ModelConfig) -> None:
    """Raise `ExportError` if no stock architecture equals the model."""
    family_of(model)


def differences(family: Family, model: ModelConfig) -> list[str]:
    """The switches that would make `model` one of the family, as overrides; none: it is."""
    found = [
        f"model.{path}={_word(value)}"
        for path, value in family.needs.items()
        if not _meets(model, path, value)
    ]
    width, heads = model.hidden_size, model.attention.num_heads
    if family.heads != "any" and width % heads:
        found.append(
            f"a model.hidden_size ({width}) that is a multiple of model.attention.num_heads ({heads})"
        )
    elif family.heads == "fill the width" and model.head_dim * heads != width:
        found.append(f"model.attention.head_dim={width // heads}")
    return found


def _meets(model: ModelConfig, path: str, value: object) -> bool:
    found = setting(model, path)
    return found is not None if value is SET else bool(found == value)


def _spoken(kin: list[Family], model: ModelConfig) -> str:
    paths = dict.fromkeys(path for family in kin for path in family.needs if path != "moe")
    return ", ".join(f"model.{path}={_word(setting(model, path))}" for path in paths)


def _why(model: ModelConfig) -> str:
    if model.moe is None or model.moe.router_choice == "token":
        return ""
    return "In all stock architectures each token chooses its experts. "


def _word(value: object) -> str:
    return "WIDTH" if value is SET else json.dumps(value)
