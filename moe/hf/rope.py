"""Rotary embedding: our switches <-> `rope_parameters` of `transformers` 5, and the older spelling beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe.config import ModelConfig
from moe.config.attention import RopeScaling
from moe.hf.family import Part

_YARN = {
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
_LLAMA = {"low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor"}
_ORIGINAL = {"original_max_position_embeddings": "original_max_sequence_length"}
_LONG = {
    "short_factor": "short_factors",
    "long_factor": "long_factors",
    "short_mscale": "short_mscale",
    "long_mscale": "long_mscale",
}
_KEYS = {
    "linear": {},
    "llama3": {**_ORIGINAL, **_LLAMA},
    "yarn": {**_ORIGINAL, **_YARN},
    "longrope": {**_ORIGINAL, **_LONG},
}
"""Kind of scaling -> their key -> ours."""
_THETA, _SCALING, _FRACTION = "attention.rope_theta", "attention.rope_scaling", "attention.rope_fraction"


USUAL = ("linear", "llama3", "yarn")


def rope(*, partial: bool = False, rotary_dim: bool = False, kinds: Sequence[str] = USUAL) -> Part:
    """Base, and where stock code knows them, `kinds` of scaling and the share of a head that is rotated.

    4.x reads `rope_theta` and `rope_scaling` and, without them, silently takes its own defaults.
    """

    def write(model: ModelConfig) -> dict[str, Any]:
        attention = model.attention
        scaling = _written(attention.rope_scaling)
        parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": attention.rope_theta}
        page: dict[str, Any] = {"rope_theta": attention.rope_theta, "rope_scaling": scaling}
        if partial:
            page["partial_rotary_factor"] = parameters["partial_rotary_factor"] = attention.rope_fraction
        if rotary_dim:
            page["rotary_dim"] = model.rotary_dim
        return {**page, "rope_parameters": parameters}

    def read(page: Mapping[str, Any]) -> dict[str, Any]:
        parameters = dict(page["rope_parameters"])
        kind = parameters.pop("rope_type", "default")
        parameters.pop("type", None)
        found: dict[str, Any] = {_THETA: float(parameters.pop("rope_theta"))}
        fraction = parameters.pop("partial_rotary_factor", 1.0)
        if partial:
            found[_FRACTION] = float(fraction)
        elif fraction != 1:
            raise ValueError(f"partial_rotary_factor is {fraction}")
        found[_SCALING] = _read(kind, parameters, page["max_position_embeddings"])
        if found[_SCALING] is not None and kind not in kinds:
            raise ValueError(f"rope_type is {kind}")
        return found

    def lacking(model: ModelConfig) -> list[str]:
        scaling = model.attention.rope_scaling
        return [] if scaling is None or scaling.kind in kinds else [f"model.{_SCALING}=null"]

    keys = {"rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"}
    paths = {_THETA, _SCALING} | ({_FRACTION} if partial else set())
    keys |= {"rotary_dim"} if rotary_dim else set()
    return Part(frozenset(keys), frozenset(paths), write, read, lacking)


def _written(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    page: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    for theirs, ours in _KEYS[scaling.kind].items():
        if (value := getattr(scaling, ours)) is not None:
            page[theirs] = list(value) if isinstance(value, tuple) else value
    return page


def _read(kind: str, parameters: dict[str, Any], length: int) -> dict[str, Any] | None:
    if kind == "default":
        # Leftovers of a scaling that is off do nothing.
        return None
    if kind not in _KEYS:
        raise ValueError(f"rope_type is {kind}")
    original = parameters.get("original_max_position_embeddings")
    factor = parameters.pop("factor", None) or (length / original if original else None)
    if factor is None:
        raise ValueError("rope_parameters has no factor")
    known = _KEYS[kind]
    if strange := [key for key in parameters if key not in known]:
        raise ValueError(f"rope_parameters has {strange[0]}")
    found = {ours: parameters[theirs] for theirs, ours in known.items() if parameters.get(theirs) is not None}
    for ours, value in found.items():
        if ours not in ("truncate", "original_max_sequence_length"):
            found[ours] = [float(one) for one in value] if isinstance(value, list) else float(value)
    if not (found.get("mscale") and found.get("mscale_all_dim")):
        found.pop("mscale", None)  # stock code wants both, or takes neither
    return {"kind": kind, "factor": float(factor), **found}
