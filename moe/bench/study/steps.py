"""What the study does, in order: a sweep, the best with more seeds, the policies; whoever calls says how a run runs."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from moe.bench.study.outcome import Outcome
from moe.bench.study.plan import Job, Jobs, StudyPlan, router_flops, tokens
from moe.data.shards import TokenData
from moe.model import count

PACKAGES = ("turnout", "torch", "deepspeed", "transformers")


@dataclass(frozen=True)
class Results:
    """All that tables and picture need."""

    sweep: dict[str, list[Outcome]]
    """Model -> its runs at every learning rate, with the first seed."""
    final: dict[str, list[Outcome]]
    """Model -> its runs at its best learning rate, a seed each."""
    policies: dict[str, list[Outcome]]
    """Policy -> its runs, a seed each."""

    def page(self) -> dict[str, Any]:
        """As plain data."""
        return {
            part: {name: [outcome.page() for outcome in runs] for name, runs in groups.items()}
            for part, groups in vars(self).items()
        }

    @classmethod
    def from_page(cls, page: dict[str, Any]) -> "Results":
        """What `page` made, back."""
        return cls(
            **{
                part: {name: [Outcome.from_page(run) for run in runs] for name, runs in page[part].items()}
                for part in ("sweep", "final", "policies")
            }
        )


def carry_out(jobs: Jobs, execute: Callable[[Job], Outcome]) -> Results:
    """Each different job once; every model gets the same number of tries."""
    plan = jobs.plan
    done: dict[str, Outcome] = {}

    def runs(wanted: Sequence[Job]) -> list[Outcome]:
        for job in wanted:
            if job.label not in done:
                done[job.label] = execute(job)
        return [done[job.label] for job in wanted]

    sweep = {model: runs(list(jobs.sweep(model))) for model in plan.models}
    rates = {model: best(tried).learning_rate for model, tried in sweep.items()}
    final = {model: runs(jobs.repeats(model, rates[model], plan.seeds)) for model in plan.models}
    policies = {}
    if plan.policies is not None:
        model, seeds = plan.policies.model, plan.policies.seeds
        for policy in plan.policies.choices:
            policies[policy] = runs(jobs.repeats(model, rates[model], seeds, policy))
    return Results(sweep, final, policies)


def best(tried: Sequence[Outcome]) -> Outcome:
    """The lowest held-out loss."""
    return min(tried, key=lambda outcome: outcome.loss)


def circumstances(jobs: Jobs) -> dict[str, Any]:
    """What was compared, on what, with which packages; plain data."""
    first = jobs.first().run
    data = TokenData.open(first.data.path, verify=False)
    return {
        "study": jobs.plan.name,
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}},
        "data": {
            "fingerprint": data.fingerprint,
            "train_tokens": data.num_tokens("train"),
            "validation_tokens": data.num_tokens("validation"),
            "validation_bytes": data.num_bytes("validation"),
        },
        "tokens_per_run": tokens(first),
        "steps": first.train.steps,
        "models": {model: _shape(jobs, model) for model in jobs.plan.models},
        "learning_rates": jobs.plan.learning_rates,
        "policies": _policies(jobs.plan),
    }


def _policies(plan: StudyPlan) -> dict[str, Any]:
    if plan.policies is None:
        return {"model": None, "choices": {}}
    return {"model": plan.policies.model, "choices": plan.policies.choices}


def _shape(jobs: Jobs, model: str) -> dict[str, Any]:
    run = jobs.job(model, jobs.plan.learning_rates[0], jobs.plan.seeds[0]).run
    counted = count(run.model, run.data.sequence_length)
    return {
        "total_parameters": counted.total_parameters,
        "active_parameters": counted.active_parameters,
        "flops_per_token": counted.flops_per_token,
        "router_flops_per_token": router_flops(run),
        "experts": run.model.moe.num_experts if run.model.moe else None,
        "top_k": run.model.moe.top_k if run.model.moe else None,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
