"""The study's plan, its order, what it calls a result, and its tables; the trainings themselves are in tests/e2e."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from moe import train
from moe.bench.study.__main__ import command
from moe.bench.study.outcome import EVALUATION, LAST_STEPS, Comparison, Load, Outcome, Spread, differences
from moe.bench.study.picture import draw
from moe.bench.study.plan import Job, Jobs, StudyPlan, expert_flops, router_flops
from moe.bench.study.runner import Runner, _check_folder
from moe.bench.study.steps import Results, carry_out
from moe.bench.study.tables import markdown
from moe.errors import CheckpointError, ConfigError
from moe.model import count
from moe.recipe import dump, load
from tests.unit.corpus import refused
from tests.unit.test_report import size

Page = dict[str, Any]
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def plan(tiny_page: Page, tmp_path: Path) -> Page:
    """Dense against 8 and 16 experts, with three policies; written to tmp_path with its recipes by `jobs`."""
    moe = tiny_page["model"].pop("moe")
    dense = {**tiny_page, "model": {**tiny_page["model"], "intermediate_size": 32}}
    sparse = {**tiny_page, "model": {**tiny_page["model"], "moe": moe}}
    (tmp_path / "dense.yaml").write_text(yaml.safe_dump(dense))
    (tmp_path / "sparse.yaml").write_text(yaml.safe_dump(sparse))
    return {
        "name": "tiny",
        "study_dir": str(tmp_path / "study"),
        "models": {
            "dense": {"recipe": "dense.yaml"},
            "sparse-8": {"recipe": "sparse.yaml"},
            "sparse-16": {"recipe": "sparse.yaml", "overrides": ["model.moe.num_experts=16"]},
        },
        "learning_rates": [1e-3, 2e-3, 4e-3],
        "seeds": [1, 2],
        "policies": {
            "model": "sparse-8",
            "seeds": [1, 2],
            "choices": {"none": ["balance.sequence_loss_weight=0"], "sequence": []},
        },
    }


def jobs(page: Page, folder: Path) -> Jobs:
    (folder / "plan.yaml").write_text(yaml.safe_dump(page, sort_keys=False))
    return Jobs(load(StudyPlan, folder / "plan.yaml"), folder)


def outcome(loss: float, seed: int = 1, load: Load | None = None, **others: Any) -> Outcome:
    settings: Page = {"model": "dense", "policy": None, "learning_rate": 1e-3, "step": 8, **others}
    return Outcome(**settings, seed=seed, loss=loss, bits_per_byte=loss / 3, load=load)


class Pretend:
    """Trains nothing: larger models are better, 2e-3 suits the dense one and 4e-3 the others."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, job: Job) -> Outcome:
        self.made.append(job.label)
        best, loss = {"dense": (2e-3, 5.0), "sparse-8": (4e-3, 4.5), "sparse-16": (4e-3, 4.25)}[job.model]
        loss += abs(job.learning_rate - best) * 100 + job.seed / 1000 + (job.policy == "none") / 8
        load = None if job.model == "dense" else Load(1.5, 0.5, 1, 0, 16)
        return Outcome(job.model, job.policy, job.learning_rate, job.seed, 8, loss, loss / 3, load)


def page_of(found: Jobs, results: Results) -> Page:
    """As the command writes it, but for the data, which are not there."""
    shape = {"total_parameters": 10**6, "active_parameters": 10**5, "flops_per_token": 10**7}
    page = {
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "data": {"validation_tokens": 1000},
        "tokens_per_run": 2048,
        "steps": 8,
        "models": {model: {**shape, "router_flops_per_token": 5 * 10**4} for model in found.plan.models},
        "learning_rates": found.plan.learning_rates,
        "policies": {
            "model": "sparse-8",
            "choices": found.plan.policies.choices if found.plan.policies else {},
        },
        "results": results.page(),
    }
    read: Page = json.loads(json.dumps(page))
    return read


def test_every_different_run_is_made_once_and_the_best_rate_goes_on(plan: Page, tmp_path: Path) -> None:
    found, pretend = jobs(plan, tmp_path), Pretend()
    found.check()
    results = carry_out(found, pretend)
    assert len(pretend.made) == len(set(pretend.made)) == found.number() == 3 * 3 + 3 + 2
    assert {model: {run.learning_rate for run in runs} for model, runs in results.final.items()} == {
        "dense": {2e-3},
        "sparse-8": {4e-3},
        "sparse-16": {4e-3},
    }
    assert [run.seed for run in results.final["dense"]] == [1, 2]
    assert results.policies["sequence"] == results.final["sparse-8"]
    assert {run.learning_rate for run in results.policies["none"]} == {4e-3}


def test_policies_with_seeds_of_their_own_are_counted_too(plan: Page, tmp_path: Path) -> None:
    plan["policies"]["seeds"] = [1, 7, 8]
    found, pretend = jobs(plan, tmp_path), Pretend()
    carry_out(found, pretend)
    assert len(pretend.made) == found.number() == 3 * 3 + 3 + 3 + 2


def test_a_job_is_the_recipe_with_its_own_rate_seed_and_folder(plan: Page, tmp_path: Path) -> None:
    job = jobs(plan, tmp_path).job("sparse-16", 2e-3, 5)
    assert job.run == load(type(job.run), job.recipe, job.overrides)
    assert (job.run.seed, job.run.train.optimizer.learning_rate) == (5, 2e-3)
    assert job.run.folder == tmp_path / "study" / "sparse-16_lr0.002_seed5"
    assert job.run.model.moe is not None
    assert job.run.model.moe.num_experts == 16


def test_flops_of_routers_are_told_apart(plan: Page, tmp_path: Path) -> None:
    found = jobs(plan, tmp_path)
    dense, sparse = (found.job(model, 1e-3, 1).run for model in ("dense", "sparse-16"))
    assert router_flops(dense) == 0
    assert router_flops(sparse) == 6 * 32 * 16 * 2
    assert expert_flops(sparse) == expert_flops(dense) == count(dense.model, 32).flops_per_token


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rates": [1e-3, 1e-3]}, "stands twice"),
        ({"seeds": [3, 3]}, "stands twice"),
        ({"seeds": []}, "seeds is []"),
        ({"models": {"dense": {"recipe": "dense.yaml"}}}, "at least 2"),
        (
            {"policies": {"model": "spare", "seeds": [1], "choices": {"none": []}}},
            "Use one of dense, sparse-8",
        ),
        ({"learning_rate": [1e-3]}, "did you mean learning_rates?"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(
    plan: Page, tmp_path: Path, change: Page, words: str
) -> None:
    with pytest.raises(ConfigError, match=words.replace("[", r"\[").replace("?", r"\?")):
        jobs({**plan, **change}, tmp_path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.moe.top_k=4", "active FLOPs a token, routers apart,"),
        ("train.steps=9", "number of training tokens"),
        ("data.sequence_length=16", "data.sequence_length"),
        ("data.path=elsewhere", "data.path of dense is data/tiny, but that of sparse-8 is elsewhere"),
        ("model.moe.top_k=9", "a top_k of 1 to 8"),
    ],
)
def test_an_unfair_comparison_is_refused(plan: Page, tmp_path: Path, override: str, words: str) -> None:
    plan["models"]["sparse-8"]["overrides"] = [override]
    with pytest.raises(ConfigError, match=words):
        jobs(plan, tmp_path).check()


def test_a_policy_that_its_model_cannot_have_is_refused_before_anything_starts(
    plan: Page, tmp_path: Path
) -> None:
    plan["policies"]["choices"]["bias"] = ["balance.bias_update_rate=0.001"]
    jobs(plan, tmp_path)
    result = CliRunner().invoke(command, [str(tmp_path / "plan.yaml")])
    refused(result, "model.moe.selection_bias is false")
    assert not (tmp_path / "study").exists()


def test_the_list_names_runs_and_trains_nothing(plan: Page, tmp_path: Path) -> None:
    jobs(plan, tmp_path)
    result = CliRunner().invoke(command, [str(tmp_path / "plan.yaml"), "--list"])
    assert result.exit_code == 0, result.output
    assert "sparse-16_lr0.004_seed1\n14 runs in all" in result.output
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("found", "margin", "verdict"),
    [
        ([-0.10, -0.12, -0.11], 0.0248, "lower"),
        ([0.10, 0.12, 0.11], 0.0248, "higher"),
        ([-0.10, -0.12, 0.02], 0.1881, "no result"),  # one seed disagrees
        ([-0.01, -0.15, -0.02], 0.1940, "no result"),  # one sign, but one seed's doing
        ([-0.10, -0.12], 0.1271, "no result"),  # two seeds must agree to a tenth of it
        ([-0.1000, -0.1001], 0.0006, "lower"),
        ([-1.0], float("inf"), "no result"),
        ([0.0, 0.0], 0.0, "no result"),
    ],
)
def test_a_difference_that_seeds_could_make_is_no_result(
    found: list[float], margin: float, verdict: str
) -> None:
    compared = Comparison.of(found)
    assert compared.mean == pytest.approx(sum(found) / len(found))
    assert compared.margin == pytest.approx(margin, abs=1e-4)
    assert compared.verdict == verdict


def test_runs_are_compared_seed_by_seed() -> None:
    baseline = [outcome(5.0, seed=1), outcome(6.0, seed=2)]
    assert differences(baseline, [outcome(4.0, seed=2), outcome(3.0, seed=9)]) == [-2.0]
    assert Spread.of([1.0, 2.0, 6.0]) == Spread(3.0, 1.0, 6.0)


def test_load_is_read_from_the_last_steps_and_the_held_out_split(plan: Page, tmp_path: Path) -> None:
    job = jobs(plan, tmp_path).job("sparse-8", 1e-3, 1)
    assert Outcome.read(job) is None
    job.run.folder.mkdir(parents=True)
    early = {"step": 1, "loss": 5.0, "max_violation": 7.0, "tokens_per_expert": [[0, 0, 0, 8], [2, 2, 2, 2]]}
    late = [
        {
            **early,
            "step": 2 + step,
            "max_violation": 1.0,
            "tokens_per_expert": [[0, 4, 0, step % 2], [2, 2, 2, 2]],
        }
        for step in range(LAST_STEPS)
    ]
    (job.run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [early, *late]))
    held_out = {
        "step": 8,
        "loss": 4.0,
        "bits_per_byte": 1.5,
        "tokens_per_expert": [[1, 1, 1, 1], [0, 2, 2, 4]],
    }
    (job.run.folder / EVALUATION).write_text(json.dumps(held_out))
    assert Outcome.read(job) is None  # not done
    (job.run.folder / "done").touch()
    found = Outcome.read(job)
    assert found is not None
    assert found.load == Load(1.0, 1.0, dead_in_training=2, dead_held_out=1, experts=8)
    assert Outcome.from_page(json.loads(json.dumps(found.page()))) == found
    assert Outcome.read(replace(job, run=job.run.model_copy(update={"train": _longer(job)}))) is None
    (job.run.folder / EVALUATION).write_text("{")
    with pytest.raises(CheckpointError, match="Remove it"):
        Outcome.read(job)


def test_runs_of_another_recipe_are_not_taken_for_ours(
    plan: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "preflight", lambda run, world_size: None)  # there are no data
    found = jobs(plan, tmp_path)
    job = found.job("sparse-8", 1e-3, 1)
    job.run.folder.mkdir(parents=True)
    (job.run.folder / "recipe.yaml").write_text(dump(job.run))
    _check_folder(job)
    longer = job.run.model_copy(update={"train": _longer(job)})
    (job.run.folder / "recipe.yaml").write_text(dump(longer))
    with pytest.raises(CheckpointError, match="a run of another recipe"):
        Runner(found).execute(job)


def _longer(job: Job) -> Any:
    return job.run.train.model_copy(update={"steps": 9})


def test_the_tables_say_what_was_found(plan: Page, tmp_path: Path) -> None:
    found = jobs(plan, tmp_path)
    text = markdown(page_of(found, carry_out(found, Pretend())))
    lines = text.splitlines()
    assert "Equal active FLOPs: 2,048 training tokens in 8 steps, 1,000 held-out tokens, 2 seeds." in lines
    assert lines[-1] == "Made with python 3.11.9, torch 2.13.0."
    row = next(line for line in lines if line.startswith("| sparse-16 | 1.00 M"))
    assert "| 10.00 M (0.05 M) | 0.004 | 4.2515 (4.2510 - 4.2520) |" in row
    assert row.endswith("| -0.750, -0.750 | -0.750 ± 0.000 | lower |")
    assert (
        "The sweep: held-out nats/token by learning rate, seed 1. Best at the edge of what was tried, so perhaps "
        "better beyond: sparse-8, sparse-16." in lines
    )
    assert "| sparse-8 | 4.8010 | 4.7010 | **4.5010** |" in lines
    policy = next(line for line in lines if line.startswith("| sequence |"))
    assert (
        "| as the recipe | 4.5015 (4.5010 - 4.5020) | -0.125, -0.125 | -0.125 ± 0.000 | lower | 1.50 (1.50 - 1.50)"
        in policy
    )
    assert policy.endswith("| 1, 1 of 16 | 0, 0 of 16 |")


@pytest.mark.parametrize("with_policies", [True, False])
def test_the_picture_is_drawn(plan: Page, tmp_path: Path, with_policies: bool) -> None:
    if not with_policies:
        del plan["policies"]
    found = jobs(plan, tmp_path)
    draw(page_of(found, carry_out(found, Pretend())), tmp_path / "study.png")
    width, height = size(tmp_path / "study.png")
    assert width == (3 if with_policies else 2) * height


def test_the_recipes_of_the_study_are_sound_and_cost_the_same() -> None:
    plan = load(StudyPlan, CONFIGS / "study" / "study.yaml")
    found = Jobs(plan, CONFIGS / "study")
    found.check()
    assert (found.path_of_data() or Path()).resolve() == CONFIGS / "study" / "data.yaml"


def test_the_tables_of_the_readme_are_those_of_the_results() -> None:
    page = json.loads((CONFIGS / "study" / "results.json").read_text())
    readme = (CONFIGS / "README.md").read_text()
    for paragraph in markdown(page).strip().split("\n\n"):
        assert paragraph in readme
