"""A dense model and how to upcycle it -> the family that it becomes, and its sparse model.

I inner width of the dense feed-forward block, S of it shared, E experts, K choices, G shards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from moe.config import ModelConfig
from moe.config.base import build, refuse
from moe.config.numbers import choice, divisors
from moe.config.shape import shape_faults
from moe.errors import ConfigError
from moe.hf.families import SPARSE_FAMILIES
from moe.hf.family import SET, Family
from moe.hf.match import NEAREST, differences, family_of


@dataclass(frozen=True)
class Options:
    """How experts are made of a dense feed-forward block."""

    num_experts: int
    top_k: int
    granularity: int = 1
    """Shards that the block is cut into; that many experts in a row, one of each, are a virtual group
    (arXiv:2410.07524, section 4.2). 1: every expert is a copy (arXiv:2212.05055)."""
    shared_expert_size: int | None = None
    """Inner columns that become an expert which every token visits; None: none."""
    first_k_dense: int = 0
    """Layers at the bottom that stay dense."""
    noise: float = 0.0
    """Standard deviation of what is added to every expert's weights, relative to theirs."""
    drop: float = 0.0
    """Share of every expert's inner columns that is drawn anew (arXiv:2502.19261, section 3)."""
    router_std: float | None = None
    """Standard deviation of the routers' weights; None: the dense model's init_std."""
    seed: int = 0
    family: str | None = None
    """model_type of the target; None: the first that the dense model can become."""

    def shard_size(self, dense: ModelConfig) -> int:
        """Inner width of an expert."""
        assert dense.intermediate_size is not None, "dense models have one"
        return (dense.intermediate_size - (self.shared_expert_size or 0)) // self.granularity

    def dropped_columns(self, dense: ModelConfig) -> int:
        """Inner columns of an expert that are drawn anew."""
        return int(self.drop * self.shard_size(dense) + 1e-9)

    def why_not_exact(self) -> tuple[str, ...]:
        """What keeps the sparse model from being the dense one's function; empty: it is, but for rounding."""
        reasons = []
        if self.noise:
            reasons.append(f"noise of {self.noise:g} standard deviations is on every expert's weights")
        if self.drop:
            reasons.append(f"{self.drop:.0%} of every expert's inner columns are drawn anew")
        return tuple(reasons)


def target(dense: ModelConfig, options: Options) -> tuple[Family, ModelConfig]:
    """The family that `options` name, or the first that fits, and the dense model made sparse as it has it.

    Raises `ConfigError`: options that contradict each other or the model, or a family it cannot become.
    """
    refuse(_faults(dense, options))
    if options.family is not None and options.family not in {family.model_type for family in SPARSE_FAMILIES}:
        known = ", ".join(family.model_type for family in SPARSE_FAMILIES)
        raise ConfigError(f"--family is {options.family!r}, which is no sparse architecture: use {known}.")
    models = {family.model_type: _model(dense, options, family) for family in SPARSE_FAMILIES}
    lacking = {family.model_type: _lacking(family, models[family.model_type]) for family in SPARSE_FAMILIES}
    wanted = [family for family in SPARSE_FAMILIES if options.family in (None, family.model_type)]
    for family in wanted:
        if not lacking[family.model_type]:
            model = models[family.model_type]
            refuse(shape_faults(model))
            if family_of(model) is not family:  # another row fits too
                model = model.model_copy(update={"architecture": family.model_type})
            return family, model
    raise ConfigError(_refusal(options.family, lacking))


_KEEPS_THE_FUNCTION: Mapping[str, object] = {
    "normalize_top_k": True,
    "router_choice": "token",
    "num_expert_groups": None,
    "expert_activation": "swiglu",
    "activation_limit": None,
    "expert_bias": False,
    "latent_size": None,
}
"""What a sparse block needs in order to be the dense one: weights that add up to 1, and experts of its kind."""
_ADD_UP = ("softmax", "sigmoid")
"""Router scores that do, once normalised, and are equal where logits are."""


def _model(dense: ModelConfig, options: Options, family: Family) -> ModelConfig:
    built_in = {
        path.removeprefix("moe."): value
        for path, value in family.needs.items()
        if path.startswith("moe.") and value is not SET
    }
    section = {
        **built_in,
        **_KEEPS_THE_FUNCTION,
        "num_experts": options.num_experts,
        "top_k": options.top_k,
        "expert_intermediate_size": options.shard_size(dense),
        "shared_expert_intermediate_size": options.shared_expert_size,
        "first_k_dense": options.first_k_dense,
    }
    if section.get("router_score") not in _ADD_UP:
        section["router_score"] = _ADD_UP[0]
    page = {
        **dense.model_dump(),
        "architecture": None,
        "intermediate_size": dense.intermediate_size if options.first_k_dense else None,
        "moe": section,
    }
    return build(ModelConfig, page, f"upcycling into {family.model_type}")


def _lacking(family: Family, model: ModelConfig) -> list[str]:
    """What the model would need in order to be of the family, as a person would ask for it."""
    spoken = {
        "model.moe.shared_expert_intermediate_size=WIDTH": "--shared-expert-size",
        "model.moe.shared_expert_intermediate_size=null": "no --shared-expert-size",
        "model.moe.first_k_dense=0": "no --first-k-dense",
    }
    return [spoken.get(difference, difference) for difference in differences(family, model)]


def _refusal(wanted: str | None, lacking: Mapping[str, list[str]]) -> str:
    within_reach = [
        name if not needs else f"{name} (with {' and '.join(needs)})"
        for name, needs in lacking.items()
        if all("--" in need for need in needs)
    ]
    way_out = f"It can become {', '.join(within_reach)}." if within_reach else "Upcycle another model."
    if wanted is not None:
        return f"--family is {wanted}, which needs {', '.join(lacking[wanted])}: the dense model lacks that. {way_out}"
    if within_reach:
        return f"no sparse architecture fits the dense model with these options. {way_out}"
    nearest = sorted(lacking.items(), key=lambda item: len(item[1]))[:NEAREST]
    needs = "".join(f"\n       {name}: {', '.join(found)}" for name, found in nearest)
    return f"no sparse architecture can hold the dense model. {way_out} The nearest would need{needs}"


def _faults(dense: ModelConfig, options: Options) -> list[str]:
    """Contradictions, a line each."""
    if dense.moe is not None or dense.intermediate_size is None:
        return ["the model has experts already, so there is no dense block to cut. Give a dense model."]
    experts, top_k, granularity = options.num_experts, options.top_k, options.granularity
    if min(experts, top_k, granularity) < 1:
        return ["--num-experts, --top-k and --granularity must be 1 or more."]
    faults = [*_sizes(dense, options), *_amounts(dense, options)]
    if experts % granularity:
        faults.append(
            f"--num-experts is {experts}, but --granularity is {granularity}: each group of {granularity} experts "
            f"holds the dense block, cut in {granularity}. Use a multiple of {granularity}."
        )
    if top_k % granularity:
        faults.append(
            f"--top-k is {top_k}, but --granularity is {granularity}: a token must visit whole groups of experts. "
            f"Use a multiple of {granularity}."
        )
    if top_k > experts:
        faults.append(
            f"--top-k is {top_k}, but --num-experts is {experts}: a token visits each expert once at most. Use "
            f"{experts} or less."
        )
    if top_k == 1:
        faults.append(
            "--top-k is 1: the weight of a single expert, normalised, is always 1, and the router would learn "
            "nothing from it. Use 2 or more."
        )
    return faults


def _sizes(dense: ModelConfig, options: Options) -> list[str]:
    assert dense.intermediate_size is not None
    faults, shared = [], options.shared_expert_size or 0
    routed = dense.intermediate_size - shared
    if not 0 <= shared < dense.intermediate_size or options.shared_expert_size == 0:
        faults.append(
            f"--shared-expert-size is {options.shared_expert_size}, but the dense block has {dense.intermediate_size} "
            f"inner columns, and routed experts need some of them. Use 1 to {dense.intermediate_size - 1}."
        )
    elif routed % options.granularity:
        faults.append(
            f"--granularity is {options.granularity}, but the dense block has {routed} inner columns to cut: shards "
            f"must be equally wide. Use {choice(divisors(routed))}."
        )
    if not 0 <= options.first_k_dense < dense.num_layers:
        faults.append(
            f"--first-k-dense is {options.first_k_dense}, but the model has {dense.num_layers} layers: at least one "
            f"must become sparse. Use 0 to {dense.num_layers - 1}."
        )
    return faults


def _amounts(dense: ModelConfig, options: Options) -> list[str]:
    faults = []
    if not (isfinite(options.noise) and options.noise >= 0):
        faults.append(f"--noise is {options.noise}: it must be 0 (none) or more, such as 0.05.")
    if not 0 <= options.drop <= 1:
        faults.append(
            f"--drop is {options.drop}: it is a share of columns, so it must be 0 to 1, such as 0.5."
        )
    elif options.drop and not options.dropped_columns(dense):
        width = options.shard_size(dense)
        faults.append(
            f"--drop is {options.drop}, but experts are {width} wide: not one column would be drawn anew. Use "
            f"{1 / max(width, 1):.2g} or more, or leave it out."
        )
    std = options.router_std
    if std is not None and not (isfinite(std) and std > 0):
        faults.append(
            f"--router-std is {std}: it must be above 0, or all groups of experts would tie and tokens would visit "
            f"parts of several. Use {dense.init_std}, say."
        )
    return faults
