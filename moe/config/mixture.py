"""Several data folders and what share each has, by stages of the run, and the rules of these settings."""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat

from moe.config.base import Count, PathText, Section


def _tuple(value: Any) -> Any:
    """YAML has lists; a frozen page has tuples."""
    return tuple(value) if isinstance(value, list) else value


class SourceConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=255)]
    """What stages and messages call it."""
    path: PathText
    """Folder with its shards."""
    format: Literal["prepared", "megatron", "datatrove"] = "prepared"
    """Who wrote them: `turnout prepare`, Megatron (.bin and .idx), or datatrove (.ds and .ds.index). The last two know
    no tokenizer: they must have been made with that of data.path."""
    weight: PositiveFloat | None = None
    """Its share of the samples, over the sum of all weights."""
    epochs: PositiveFloat | None = None
    """How often the run sees it, instead of a weight; all sources or none."""
    max_epochs: PositiveFloat = 4.0
    """A run that would see it more often is refused before it starts; what repeats more often is worth less and less
    (arXiv:2305.16264)."""


class MixtureStage(Section):
    from_step: Count
    """The first step, from 0, that has these weights; the next stage ends it."""
    weights: dict[str, NonNegativeFloat]
    """Of each source by name; those left out have none."""


class MixtureConfig(Section):
    sources: Annotated[tuple[SourceConfig, ...], BeforeValidator(_tuple), Field(min_length=1)]
    """Where samples come from."""
    stages: Annotated[tuple[MixtureStage, ...], BeforeValidator(_tuple)] = ()
    """Weights that change in the course of the run, instead of each source's own."""


def mixture_faults(mixture: MixtureConfig | None, steps: int) -> list[str]:
    """What contradicts itself, a sentence each; `steps`: of the run."""
    if mixture is None:
        return []
    names = [source.name for source in mixture.sources]
    faults = [
        f"data.mixture.sources names {name} {names.count(name)} times: stages could not tell them apart. Give each "
        f"its own name."
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    return faults + (_stage_faults(mixture, steps) if mixture.stages else _weight_faults(mixture))


def _weight_faults(mixture: MixtureConfig) -> list[str]:
    given = {(source.weight is not None) + 2 * (source.epochs is not None) for source in mixture.sources}
    if given in ({1}, {2}):
        return []
    return [
        "data.mixture.sources must all have a weight, or all have epochs, and not both: shares would not be defined. "
        "Give each source one of them, the same for all; or give weights in data.mixture.stages alone."
    ]


def _stage_faults(mixture: MixtureConfig, steps: int) -> list[str]:
    faults, names = [], {source.name for source in mixture.sources}
    if any(source.weight is not None or source.epochs is not None for source in mixture.sources):
        faults.append(
            "data.mixture.stages is set, but so is a weight, or epochs, of a source, which then has no effect. Remove "
            "one or the other."
        )
    begins = [stage.from_step for stage in mixture.stages]
    if begins[0] != 0 or any(a >= b for a, b in pairwise(begins)):
        faults.append(
            f"data.mixture.stages begin at steps {begins}: the first must begin at 0, and each of the others later "
            f"than the one before. Order them."
        )
    if begins[-1] >= steps:
        faults.append(
            f"data.mixture.stages: the last begins at step {begins[-1]}, but train.steps is {steps}, so it has no "
            f"effect. Remove it, or begin it earlier."
        )
    used = {name for stage in mixture.stages for name, weight in stage.weights.items() if weight}
    faults += [
        f"data.mixture.stages: source {name} has no weight in any of them, so it has no effect. Give it some, or "
        f"remove the source."
        for name in sorted(names - used)
        if used
    ]
    for stage in mixture.stages:
        if unknown := sorted(set(stage.weights) - names):
            faults.append(
                f"data.mixture.stages: the one from step {stage.from_step} on has a weight of {unknown[0]}, which is "
                f"no source. Sources are {', '.join(sorted(names))}."
            )
        if not any(stage.weights.values()):
            faults.append(
                f"data.mixture.stages: the one from step {stage.from_step} on has no weight above 0: there would be "
                f"nothing to train on. Give a source some."
            )
    return faults
