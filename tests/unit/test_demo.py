"""What the demo may remove, and what it calls a success."""

from pathlib import Path

import click
import pytest

from launch import demo
from moe import recipe
from moe.config import RunConfig, check_world
from moe.errors import ConfigError


def test_it_never_removes_a_folder_that_it_did_not_make(tmp_path: Path) -> None:
    mine = tmp_path / "demo" / "precious"
    mine.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no demo made it .* Move it away"):
        demo._start_over(tmp_path / "demo")
    assert mine.is_dir()


def test_it_starts_over_in_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    demo._start_over(folder)
    mark = list(folder.iterdir())
    (folder / "run").mkdir()
    demo._start_over(folder)
    assert list(folder.iterdir()) == mark


@pytest.mark.parametrize(("bits_per_byte", "good"), [(2.0, True), (2.5, False), (3.0, False)])
def test_it_fails_unless_the_model_beats_single_tokens(bits_per_byte: float, good: bool) -> None:
    results = {"after": {"bits_per_byte": bits_per_byte, "unigram_bits_per_byte": 2.5}}
    if good:
        demo._judge(results)
    else:
        with pytest.raises(click.ClickException, match="has not learned"):
            demo._judge(results)


def test_a_verb_that_fails_ends_it_with_the_command_and_the_code() -> None:
    with pytest.raises(click.ClickException, match=r"`turnout nothing` ended with code 2 instead of 0"):
        demo._turnout("nothing")


def test_its_recipe_is_the_one_it_promises() -> None:
    run = recipe.load(RunConfig, demo.CONFIGS / "demo.yaml")
    moe = run.model.moe
    assert moe is not None
    assert (moe.num_experts >= 8, moe.top_k, run.model.vocab_size) == (True, 2, 8192)
    assert (run.parallel.expert_parallel_size, run.parallel.zero_stage) == (2, 1)
    assert check_world(run, 2) >= 1
