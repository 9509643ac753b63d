"""A recipe -> its certificate: the small recipe in every layout beside one process."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe.certify import ranks
from moe.certify.compare import Pieces, compare, equal_states, piece, state_before
from moe.certify.layouts import Choice, Layout, choose, reference, spread
from moe.certify.parts import Deviation
from moe.certify.ranks import Fault, Place, Plant
from moe.certify.seen import Job, Seen
from moe.certify.shrink import STEPS, shrink
from moe.config import RunConfig
from moe.errors import TrainingError

SAVED_AT = 2
"""Steps before the stop of those that resume."""
_TERMS: dict[str, dict[str, float]] = {
    "load-balancing loss": {
        "sequence_loss_weight": 0.0,
        "micro_batch_loss_weight": 0.0,
        "global_batch_loss_weight": 0.0,
    },
    "router z-loss": {"router_z_loss_weight": 0.0},
}
"""Term of the loss -> how to train without it."""


@dataclass(frozen=True)
class Trial:
    """One layout beside one process."""

    layout: Layout
    deviations: tuple[Deviation, ...]
    """Every check's, the largest of all steps."""

    @property
    def findings(self) -> tuple[Deviation, ...]:
        """What is too far, first things first."""
        return tuple(deviation for deviation in self.deviations if not deviation.passed)


@dataclass(frozen=True)
class Proof:
    """What was tried, and how it came out."""

    recipe: RunConfig
    small: RunConfig
    device: str
    trials: tuple[Trial, ...]
    left_out: tuple[tuple[Layout, str], ...]

    @property
    def passed(self) -> bool:
        return not any(trial.findings for trial in self.trials)


@dataclass(frozen=True)
class Progress:
    """How far a proof is; `done` is called once for each of `total` trainings."""

    begin: Callable[[int], None]
    done: Callable[[str], None]


def certify(
    recipe: RunConfig,
    world_size: int = 4,
    layouts: Sequence[str] = (),
    progress: Progress | None = None,
    plant: Plant | None = None,
    job_s: float = ranks.JOB_SECONDS,
) -> Proof:
    """Train the small recipe in one process and in each layout, and compare.

    `plant` is called in every rank before each training: a place for tests to put faults. Raises `ConfigError` for
    layouts that cannot be, `TrainingError` if one process alone cannot train the small recipe.
    """
    small = shrink(recipe, world_size)
    choice = choose(small, recipe, world_size, layouts)
    with tempfile.TemporaryDirectory(prefix="turnout-certify-") as folder:
        plan = _Plan.of(small, choice, Path(folder))
        if progress is not None:
            progress.begin(len(plan.jobs))
        report = (lambda job: progress.done(str(job.layout))) if progress else (lambda job: None)
        found: dict[str, Seen | Fault] = {}
        place = Place(Path(folder), ranks.device(max(layout.world for layout in choice.layouts)), job_s)
        for jobs in plan.launches():
            found |= ranks.run(jobs, place, report, plant)
    trials = [_reference_trial(name, plan, found) for name in plan.references.values()]
    trials += [_trial(layout, plan, found) for layout in choice.layouts]
    return Proof(recipe, small, place.device, tuple(trials), choice.left_out)


@dataclass(frozen=True)
class _Plan:
    """Which trainings prove a choice of layouts."""

    jobs: tuple[Job, ...]
    references: dict[Layout, str]
    """Name of the training of each reference."""
    small: RunConfig

    @classmethod
    def of(cls, small: RunConfig, choice: Choice, folder: Path) -> "_Plan":
        plain = small.model_copy(update={"deepspeed": {}})
        references = {
            layout: f"reference-{index}"
            for index, layout in enumerate(dict.fromkeys(reference(small, each) for each in choice.layouts))
        }
        jobs = []
        for layout, name in references.items():
            run = spread(plain, layout, folder / name)
            resized = any(
                reference(small, each) == layout and each.then == "resize" for each in choice.layouts
            )
            jobs.append(Job(name, run, layout, save_at=SAVED_AT if resized else None))
            other = spread(plain, layout, folder / f"{name}-padding")
            jobs.append(Job(f"{name}-padding", other, layout, last=2, padding=1))
            for index, changes in enumerate(_TERMS.values()):
                if small.model.moe is not None and any(getattr(small.balance, key) for key in changes):
                    less = run.model_copy(update={"balance": small.balance.model_copy(update=changes)})
                    jobs.append(Job(f"{name}-term-{index}", less, layout, last=1))
        for index, layout in enumerate(choice.layouts):
            name, beside = f"layout-{index}", reference(small, layout)
            here = spread(small, layout, folder / name)
            jobs.append(Job(name, here, layout, save_at=SAVED_AT if layout.then else None))
            if layout.then == "resume":
                jobs.append(Job(f"{name}-resume", here, layout, first=SAVED_AT))
            if layout.then == "resize":
                there = spread(small, layout, folder / references[beside])
                jobs.append(Job(f"{name}-from-one", there, layout, first=SAVED_AT))
                jobs.append(
                    Job(f"{name}-to-one", spread(plain, beside, folder / name), beside, first=SAVED_AT)
                )
        return cls(tuple(jobs), references, small)

    def launches(self) -> Iterable[list[Job]]:
        """Jobs of one world size each, what one needs before it."""
        to_one = [job for job in self.jobs if job.name.endswith("-to-one")]
        others = [job for job in self.jobs if job not in to_one]
        for world in sorted({job.layout.world for job in others}):
            yield [job for job in others if job.layout.world == world]
        if to_one:
            yield to_one


def _pieces(name: str, plan: _Plan, found: dict[str, Seen | Fault]) -> Pieces:
    """What each balancing term adds to the gradients of a reference."""
    pieces = {}
    for index, term in enumerate(_TERMS):
        whole, less = found[name], found.get(f"{name}-term-{index}")
        if isinstance(whole, Seen) and isinstance(less, Seen):
            pieces[term] = piece(whole, less, plan.small)
    return pieces


def _reference_trial(name: str, plan: _Plan, found: dict[str, Seen | Fault]) -> Trial:
    """One process beside the laws, and beside itself with other tokens as padding."""
    seen, padded = found[name], found[f"{name}-padding"]
    job = next(job for job in plan.jobs if job.name == name)
    if isinstance(seen, Fault):
        raise TrainingError(f"one process cannot train the small recipe. {seen.message}")
    deviations = compare(seen, seen, job.run)
    if isinstance(padded, Fault):
        deviations.append(_did_not_end(padded))
    else:
        deviations += [
            replace(deviation, check=f"{deviation.check}, with other padding")
            for deviation in compare(padded, seen, job.run)
            if not deviation.passed
        ] or [Deviation("padding", 0.0, 0.0, 0)]
    return Trial(job.layout, _largest(deviations))


def _trial(layout: Layout, plan: _Plan, found: dict[str, Seen | Fault]) -> Trial:
    index = next(job.name for job in plan.jobs if job.layout == layout and job.name.startswith("layout-"))
    beside = plan.references[reference(plan.small, layout)]
    one, seen = found[beside], found[index]
    assert isinstance(one, Seen), "otherwise there is no trial"
    if isinstance(seen, Fault):
        return Trial(layout, (_did_not_end(seen),))
    run = spread(plan.small, layout)
    deviations = compare(seen, one, run, _pieces(beside, plan, found))
    if layout.then == "resume":
        deviations += _resumed("resume", found[f"{index}-resume"], seen, one, run, exact=True)
    if layout.then == "resize":
        deviations += _resumed("resize from one process", found[f"{index}-from-one"], one, one, run)
        deviations += _resumed("resize to one process", found[f"{index}-to-one"], seen, one, run)
    return Trial(layout, _largest(deviations))


def _resumed(
    what: str, seen: Seen | Fault, saved: Seen, one: Seen, run: RunConfig, exact: bool = False
) -> list[Deviation]:
    """A training that went on from `saved`: its state at once, to the bit; its steps beside one process, or exact."""
    if isinstance(seen, Fault):
        return [replace(_did_not_end(seen), check=f"{what}: runs to its end")]
    found = []
    state, kept = seen.before, state_before(saved, SAVED_AT)
    for kind in dict.fromkeys(key.partition("/")[0] for key in kept):
        mine = {key: tensor for key, tensor in state.items() if key.startswith(f"{kind}/")}
        theirs = {key: tensor for key, tensor in kept.items() if key.startswith(f"{kind}/")}
        found += equal_states(f"{kind} after {what}", mine, theirs, SAVED_AT)
    if exact:
        for number in range(SAVED_AT, STEPS):
            after, straight = state_before(seen, number + 1), state_before(saved, number + 1)
            found += equal_states(f"steps after {what}", after, straight, number)
    else:
        found += [replace(d, check=f"{d.check} after {what}") for d in compare(seen, one, run)]
    return found


def _did_not_end(fault: Fault) -> Deviation:
    return Deviation("runs to its end", float("inf"), 0.0, 0, "", fault.message)


def _largest(deviations: Sequence[Deviation]) -> tuple[Deviation, ...]:
    """Of each check the first that failed, or the largest; in the order of their first failure, then as they came."""
    kept: dict[str, Deviation] = {}
    for deviation in deviations:
        before = kept.get(deviation.check)
        if before is None or (before.passed and not deviation.deviation <= before.deviation):
            kept[deviation.check] = deviation
    return tuple(sorted(kept.values(), key=lambda d: (d.passed, d.step if not d.passed else 0)))
