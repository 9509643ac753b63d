"""What a row of the table of stock architectures is made of: names of tensors, settings, and their two spellings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

from moe.config import ModelConfig

SET = object()
"""Any value but null."""
Layers = Literal["none", "all", "dense", "sparse", "prediction"]


@dataclass(frozen=True)
class Name:
    """A logical tensor of ours and the disk tensors that hold its rows.

    `{layer}` runs over `layers`. Of a stacked tensor, whose shape begins with E, either `{expert}` runs over its
    pieces, or one disk tensor holds them all, piece after piece. Several disk names are equal blocks of a piece's
    rows, in order (gate above up).
    """

    ours: str
    disk: tuple[str, ...]
    shape: tuple[str, ...]
    """Dimensions of ours, in the letters of `sizes`."""
    layers: Layers = "all"
    when: Mapping[str, object] = field(default_factory=dict)
    """Path in our model section -> the value with which the tensor is there; `SET` for any but null."""
    order: Callable[[ModelConfig], list[int]] | None = None
    """Which row of a piece on disk each of our rows is; None: the same."""
    transposed: bool = False
    """Whether a piece on disk has rows as columns."""
    disk_shape: tuple[str, ...] | None = None
    """Of the disk tensor, where it is another than ours with as many elements."""
    wide: bool = False
    """Whether it is float32 on disk whatever the weights are."""
    part: tuple[int, int] = (0, 1)
    """Which of how many equal blocks of the disk tensor's rows it is; the blocks follow one another in `names`."""
    copy: bool = False
    """Whether it is a second home of a tensor, which a folder may have or not."""


@dataclass(frozen=True)
class Part:
    """Settings that need more than a change of name, in both directions."""

    keys: frozenset[str]
    """Keys of config.json that it reads and writes."""
    paths: frozenset[str]
    """Paths in our model section that it decides."""
    write: Callable[[ModelConfig], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    """A page with all keys -> values by path; raises `ValueError` saying what we have no switch for."""
    lacking: Callable[[ModelConfig], list[str]] = lambda model: []
    """What a model must change to be written so, as `model.path=value`."""


@dataclass(frozen=True)
class Family:
    """A stock architecture: what it needs of a model, and how it spells it.

    Every switch that neither `needs` nor `settings` nor `parts` speak of must be neutral: see `NEUTRAL`.
    """

    model_type: str
    architecture: str
    needs: Mapping[str, object]
    """Path in our model section -> the value that this architecture has built in; `SET` for any but null."""
    names: tuple[Name, ...]
    settings: Mapping[str, str]
    """Key in config.json -> path in our model section; of several with one path, the first is read."""
    parts: tuple[Part, ...]
    constants: Mapping[str, object]
    """Keys in config.json whose value follows from the row alone; a folder with another is not imported."""

    @property
    def sparse(self) -> bool:
        return self.needs.get("moe") is SET

    @property
    def paths(self) -> set[str]:
        """All paths in our model section that the row speaks of."""
        return {*self.needs, *self.settings.values(), *(path for part in self.parts for path in part.paths)}


def sizes(model: ModelConfig) -> dict[str, int]:
    """Dimension letters -> sizes; letters of absent parts are left out."""
    attention, heads = model.attention, model.attention.num_heads
    found = {
        "V": model.vocab_size,
        "D": model.hidden_size,
        "2D": 2 * model.hidden_size,
        "H": heads,
        "Q": heads * model.head_dim,
        "K": model.num_kv_heads * model.head_dim,
        "O": heads * model.value_head_dim,
        "h": model.head_dim,
        "1": 1,
    }
    if (latent := attention.latent) is not None:
        found["c"] = latent.kv_rank
        found["cr"] = latent.kv_rank + latent.rope_head_dim
        found["U"] = heads * (latent.nope_head_dim + latent.value_head_dim)
        if latent.query_rank is not None:
            found["q"] = latent.query_rank
    if model.intermediate_size is not None:
        found["I"] = model.intermediate_size
    if (moe := model.moe) is not None:
        found |= {
            "E": moe.num_experts,
            "F": moe.expert_intermediate_size,
            "2F": 2 * moe.expert_intermediate_size,
        }
        if moe.shared_expert_intermediate_size is not None:
            found["S"] = moe.shared_expert_intermediate_size
    return found


def setting(model: ModelConfig, path: str) -> Any:
    """The value at a dotted path of the model section; None below an absent block."""
    return reduce(lambda here, key: None if here is None else getattr(here, key), path.split("."), model)


def meets(model: ModelConfig, path: str, value: object) -> bool:
    """Whether the model has that value at the path; `SET`: any but null."""
    found = setting(model, path)
    return found is not None if value is SET else bool(found == value)


NEUTRAL: Mapping[str, object] = {
    "attention.latent": None,
    "attention.qk_norm": "none",
    "attention.qkv_bias": False,
    "attention.output_bias": False,
    "attention.clip_qkv": None,
    "attention.rope_fraction": 1.0,
    "attention.rope_scaling": None,
    "attention.rope_layers": "all",
    "attention.sliding_window": None,
    "attention.window_layers": None,
    "attention.sinks": False,
    "attention.output_gate": False,
    "attention.scale": None,
    "norm": "rms",
    "norm_placement": "pre",
    "head_bias": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logit_divisor": 1.0,
    "prediction_depth": 0,
    "moe": None,
    "moe.expert_activation": "swiglu",
    "moe.activation_limit": None,
    "moe.expert_bias": False,
    "moe.latent_size": None,
    "moe.router_score": "softmax",
    "moe.router_choice": "token",
    "moe.router_bias": False,
    "moe.normalize_top_k": True,
    "moe.route_scale": 1.0,
    "moe.num_expert_groups": None,
    "moe.selection_bias": False,
    "moe.first_k_dense": 0,
    "moe.dense_layers": (),
    "moe.shared_expert_intermediate_size": None,
    "moe.shared_expert_gate": False,
}
"""Switches of the model section and the value that no architecture has to speak of.

Sizes are not here, nor what has an effect only beside a switch that is.
"""
