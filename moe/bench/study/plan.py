"""A plan (YAML) -> the runs that it asks for, every one checked before the first starts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, model_validator

from moe.config import RunConfig
from moe.config.base import PathText, Section
from moe.config.model import MoEConfig
from moe.errors import ConfigError
from moe.model import count
from moe.recipe import load

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*$", max_length=60)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)]


class Contender(Section):
    recipe: PathText
    """A run's recipe; its path begins at the plan."""
    overrides: list[str] = Field(default_factory=list)
    """key=value changes of it."""


class PolicyPlan(Section):
    model: Name
    """The contender that every policy trains."""
    seeds: Seeds
    """Runs of each policy."""
    choices: Annotated[dict[Name, list[str]], Field(min_length=1)]
    """Name of a policy -> key=value changes of the contender; an empty list: as it is."""


class StudyPlan(Section):
    name: Name
    """The study's name."""
    study_dir: PathText | None = None
    """Where its runs and results go; null: runs/NAME."""
    data: PathText | None = None
    """A data recipe for `turnout prepare`, its path from the plan; null: the data is there."""
    models: Annotated[dict[Name, Contender], Field(min_length=2)]
    """What is compared: the first is the baseline."""
    learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)]
    """Tried for every model with the first seed; the best of each trains with the other seeds."""
    seeds: Seeds
    """Runs of each model at its best learning rate."""
    policies: PolicyPlan | None = None
    """Balancing policies on one of the models; null: no such comparison."""

    @property
    def folder(self) -> Path:
        """Where the study lives."""
        return Path(f"runs/{self.name}" if self.study_dir is None else self.study_dir)

    @property
    def baseline(self) -> str:
        return next(iter(self.models))

    @model_validator(mode="after")
    def _agrees(self) -> "StudyPlan":
        for name, values in (("learning_rates", self.learning_rates), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} is {values}, but each run is made once. Remove what stands twice.")
        policies = self.policies
        if policies is not None and policies.model not in self.models:
            raise ConfigError(
                f"policies.model is {policies.model!r}, but that is none of the models. "
                f"Use one of {', '.join(self.models)}."
            )
        return self


@dataclass(frozen=True)
class Job:
    """One training run."""

    model: str
    policy: str | None
    """None: the model's recipe as it is."""
    learning_rate: float
    seed: int
    recipe: Path
    overrides: tuple[str, ...]
    """Of the recipe, complete: what `turnout train` gets."""
    run: RunConfig

    @property
    def label(self) -> str:
        """Its name in logs and its folder's name."""
        policy = "" if self.policy is None else f"_{self.policy}"
        return f"{self.model}{policy}_lr{self.learning_rate:g}_seed{self.seed}"


class Jobs:
    """Makes the jobs of a plan, whose paths begin at `home`."""

    def __init__(self, plan: StudyPlan, home: Path) -> None:
        self.plan = plan
        self._home = home

    def job(self, model: str, learning_rate: float, seed: int, policy: str | None = None) -> Job:
        """Raises `ConfigError` if the recipe with these changes is not sound."""
        contender, policies = self.plan.models[model], self.plan.policies
        changes = policies.choices[policy] if policies is not None and policy is not None else []
        if not changes:
            policy = None  # the same training, so the same run
        recipe = self._home / contender.recipe
        bare = Job(
            model, policy, learning_rate, seed, recipe, (), load(RunConfig, recipe, contender.overrides)
        )
        overrides = (
            *contender.overrides,
            *changes,
            f"name={self.plan.name}-{bare.label}",
            f"run_dir={self.plan.folder / bare.label}",
            f"seed={seed}",
            f"train.optimizer.learning_rate={learning_rate!r}",
        )
        return Job(model, policy, learning_rate, seed, recipe, overrides, load(RunConfig, recipe, overrides))

    def path_of_data(self) -> Path | None:
        """The data recipe, if the plan names one."""
        return None if self.plan.data is None else self._home / self.plan.data

    def first(self) -> Job:
        """The baseline's first run."""
        return self.job(self.plan.baseline, self.plan.learning_rates[0], self.plan.seeds[0])

    def number(self) -> int:
        """Different runs in the study, whatever the best learning rates will be."""
        plan = self.plan
        total = len(plan.models) * (len(plan.learning_rates) + len(plan.seeds) - 1)
        if plan.policies is not None:
            as_it_is = [changes for changes in plan.policies.choices.values() if not changes]
            total += len(plan.policies.seeds) * (len(plan.policies.choices) - len(as_it_is))
            total += len(set(plan.policies.seeds) - set(plan.seeds)) * bool(as_it_is)
        return total

    def check(self) -> None:
        """Raise `ConfigError` unless every recipe is sound and all models get the same text and active FLOPs."""
        plan = self.plan
        for rate in plan.learning_rates:
            for model in plan.models:
                self.job(model, rate, plan.seeds[0])
        for policy in plan.policies.choices if plan.policies else ():
            self.job(plan.policies.model, plan.learning_rates[0], plan.seeds[0], policy)  # type: ignore[union-attr]  # there are some
        first = self.first()
        for model in plan.models:
            _same(first, self.job(model, plan.learning_rates[0], plan.seeds[0]))

    def sweep(self, model: str) -> Iterator[Job]:
        return (self.job(model, rate, self.plan.seeds[0]) for rate in self.plan.learning_rates)

    def repeats(
        self, model: str, learning_rate: float, seeds: Sequence[int], policy: str | None = None
    ) -> list[Job]:
        return [self.job(model, learning_rate, seed, policy) for seed in seeds]


def router_flops(run: RunConfig) -> int:
    """FLOPs a token, forward and backward, of all routers: the part that a dense model does not have."""
    moe: MoEConfig | None = run.model.moe
    return 6 * run.model.hidden_size * moe.num_experts * len(run.model.sparse_layers) if moe else 0


def expert_flops(run: RunConfig) -> int:
    """Active FLOPs a token, forward and backward, without the routers'."""
    return count(run.model, run.data.sequence_length).flops_per_token - router_flops(run)


def tokens(run: RunConfig) -> int:
    """Tokens that a run trains on."""
    return run.train.steps * run.train.global_batch_size * run.data.sequence_length


def _same(one: Job, other: Job) -> None:
    for what, of_one, of_other in (
        ("data.path", one.run.data.path, other.run.data.path),
        ("data.sequence_length", one.run.data.sequence_length, other.run.data.sequence_length),
        ("the number of training tokens", tokens(one.run), tokens(other.run)),
        ("active FLOPs a token, routers apart,", expert_flops(one.run), expert_flops(other.run)),
    ):
        if of_one != of_other:
            raise ConfigError(
                f"{what} of {one.model} is {of_one}, but that of {other.model} is {of_other}: models are compared "
                f"on the same text for the same cost. Change one of the two recipes, or its overrides."
            )
