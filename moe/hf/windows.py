"""Sliding windows: our switches <-> the ways in which stock architectures say which layers have one."""

from collections.abc import Mapping
from typing import Any

from moe.config import ModelConfig
from moe.hf.family import Part

Page = Mapping[str, Any]

_WINDOW_PATHS = frozenset({"attention.sliding_window", "attention.window_layers"})
UNIFORM_WINDOW = Part(
    keys=frozenset({"sliding_window"}),
    paths=_WINDOW_PATHS,
    write=lambda model: {"sliding_window": model.attention.sliding_window},
    read=lambda page: {"attention.sliding_window": page["sliding_window"]},
    lacking=lambda model: (
        [] if model.attention.window_layers is None else ["model.attention.window_layers=null"]
    ),
)
"""All layers have the window, or none (Mixtral)."""


def _window_types(model: ModelConfig) -> list[str]:
    windows = [model.attention.window(layer) for layer in range(model.num_layers)]
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


def _windows(page: Page) -> dict[str, Any]:
    kinds = page["layer_types"]
    if strange := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
        raise ValueError(f"layer_types has {strange[0]}")
    layers = [n for n, kind in enumerate(kinds) if kind == "sliding_attention"]
    if not layers or page["sliding_window"] is None:
        return {"attention.sliding_window": None, "attention.window_layers": None}
    some = layers if len(layers) < len(kinds) else None
    return {"attention.sliding_window": page["sliding_window"], "attention.window_layers": some}


def layer_windows(*, always: bool = False) -> Part:
    """Each layer has the window or not. `always`: stock code wants a width even where no layer has it."""

    def write(model: ModelConfig) -> dict[str, Any]:
        window = model.attention.sliding_window
        if window is None and always:
            window = model.max_sequence_length  # changes nothing, whoever takes it for a layer's own
        return {"sliding_window": window, "layer_types": _window_types(model)}

    return Part(frozenset({"sliding_window", "layer_types"}), _WINDOW_PATHS, write, _windows)


def _qwen_windows(*, per_layer: bool) -> Part:
    """A switch beside the window; older readers know the layers above a number only."""

    def write(model: ModelConfig) -> dict[str, Any]:
        layers = [n for n in range(model.num_layers) if model.attention.window(n) is not None]
        found = {
            "use_sliding_window": bool(layers),
            "sliding_window": model.attention.sliding_window,
            "max_window_layers": min(layers) if layers and per_layer else model.num_layers,
        }
        return {**found, "layer_types": _window_types(model)} if per_layer else found

    def read(page: Page) -> dict[str, Any]:
        if not page["use_sliding_window"]:
            return {"attention.sliding_window": None, "attention.window_layers": None}
        return _windows(page) if per_layer else UNIFORM_WINDOW.read(page)

    keys = {"use_sliding_window", "sliding_window", "max_window_layers"}
    return Part(
        frozenset(keys | ({"layer_types"} if per_layer else set())),
        _WINDOW_PATHS,
        write,
        read,
        (lambda model: []) if per_layer else UNIFORM_WINDOW.lacking,
    )


QWEN_WINDOWS = _qwen_windows(per_layer=True)
QWEN_MOE_WINDOW = _qwen_windows(per_layer=False)
