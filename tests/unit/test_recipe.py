"""YAML and overrides in, settings out; and back without loss."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import recipe
from moe.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from moe.config.base import Section
from moe.engine import ds_config
from moe.errors import ConfigError

Page = dict[str, Any]

NOT_A_RECIPE = {
    "a key twice": ("a: 1\na: 2\n", "r.yaml, line 2: 'a' stands twice in one block. Keep one of them."),
    "a key twice deep down": ("a:\n  b: 1\n  b: 2\n", "r.yaml, line 3: 'b' stands twice"),
    "an open bracket": ("a: [1\n", "r.yaml, line 2: this is not YAML (expected ',' or ']'"),
    "a tab": ("a:\n\tb: 1\n", "r.yaml, line 2: this is not YAML (found character '\\t'"),
    "a list": ("- a\n", "r.yaml: a recipe is a page of `key: value` lines, but this is ['a']"),
    "a word": ("hello\n", "r.yaml: a recipe is a page of `key: value` lines, but this is 'hello'"),
    "a number for a name": ("1: 2\n", "r.yaml, line 1: 1: a setting's name must be a word"),
    "a template": ("a: {{x}}\n", "r.yaml, line 1: {'x': None}: a setting's name must be a word"),
    "an unknown alias": ("a: *x\n", "r.yaml, line 1: this is not YAML (found undefined alias"),
    "a python object": ("a: !!python/object:os.system 1\n", "r.yaml, line 1: this is not YAML (could not"),
    "a zero byte": ("a: \0\n", "r.yaml: this is not YAML (unacceptable character"),
    "nothing": ("", "r.yaml: name is required, but it is not set"),
    "only comments": ("# later\n", "r.yaml: name is required, but it is not set"),
}

NOT_A_VALUE = {
    "digits without end": ("9" * 5000, "'9999", "cannot be read as a whole number"),
    "a tagged word for a count": ("!!int abc", "'abc'", "cannot be read as a whole number"),
    "a tagged nothing for a count": ("!!int ''", "''", "cannot be read as a whole number"),
    "a tagged word for a number": ("!!float x", "'x'", "cannot be read as a number"),
    "a tagged word for a switch": ("!!bool x", "'x'", "cannot be read as true or false"),
    "a tagged word for a date": ("!!timestamp x", "'x'", "cannot be read as a date"),
    "no binary digits": ("0b_", "'0b_'", "cannot be read as a whole number"),
    "no hexadecimal digits": ("0x_", "'0x_'", "cannot be read as a whole number"),
    "many brackets": ("[" * 3000, "", "nested too deep"),
    "many closed brackets": ("[" * 3000 + "]" * 3000, "", "nested too deep"),
    "many blocks": ("{a: " * 3000 + "1" + "}" * 3000, "", "nested too deep"),
    "a merge": ("{<<: {a: 1}}", "", "merge keys (<<) are not supported"),
}

NOT_AN_OVERRIDE = {
    "no equals sign": ("train.steps", "override 'train.steps': write key=value with the full path"),
    "no key": ("=10", "override '=10': write key=value with the full path"),
    "a hole in the path": ("train..steps=10", "override 'train..steps=10': write key=value"),
    "a path through a value": (
        "name.x=1",
        "override 'name.x=1': name is 'tiny' in the recipe, not a block. Write all of it: name=VALUE",
    ),
    "a broken value": ("name=[1", "override 'name=[1', line 1: this is not YAML"),
}


@pytest.mark.parametrize("case", NOT_A_RECIPE)
def test_text_that_is_no_recipe_is_refused_with_its_place(case: str) -> None:
    text, said = NOT_A_RECIPE[case]
    with pytest.raises(ConfigError) as refused:
        recipe.parse(RunConfig, text, source="r.yaml")
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("where", ["page", "override"])
@pytest.mark.parametrize("case", NOT_A_VALUE)
def test_a_value_that_yaml_cannot_read_is_refused(case: str, where: str, tiny_page: Page) -> None:
    text, *said = NOT_A_VALUE[case]
    page = yaml.safe_dump({key: value for key, value in tiny_page.items() if key != "seed"})
    text_and_overrides = (f"seed: {text}\n{page}", []) if where == "page" else (page, [f"seed={text}"])
    with pytest.raises(ConfigError) as refused:
        recipe.parse(RunConfig, *text_and_overrides, source="r.yaml")
    message = str(refused.value)
    assert message.startswith("r.yaml" if where == "page" else ("override 'seed=", 'override "seed='))
    assert [part for part in said if part not in message] == [], message
    assert len(message) < 300


@pytest.mark.parametrize("name", ["2020-13-45", "2020-01-02"])
def test_a_name_may_look_like_a_date(name: str, tiny_page: Page) -> None:
    run = recipe.parse(RunConfig, yaml.safe_dump(tiny_page), [f"name={name}"], source="r.yaml")
    assert run.name == name
    assert recipe.parse(RunConfig, recipe.dump(run), source="dump") == run


@pytest.mark.parametrize("path", ["a", "deepspeed", "deepspeed.zero_optimization", "train.schedule"])
def test_an_override_of_any_depth_is_no_crash(path: str, tiny_page: Page) -> None:
    def read() -> None:
        override = f"{path}{'.a' * 3000}=1"
        run = recipe.parse(RunConfig, yaml.safe_dump(tiny_page), [override], source="r.yaml")
        ds_config.check(run.deepspeed, run.parallel.zero_stage)

    with pytest.raises(ConfigError) as refused:
        read()
    assert len(str(refused.value)) < 500


def test_data_recipes_share_the_type_of_a_path() -> None:
    class Output(Section):
        output: recipe.PathText

    assert recipe.parse(Output, "output: data/tiny", source="r.yaml").output == "data/tiny"
    with pytest.raises(ConfigError, match=r"output is '~/x': write the full path"):
        recipe.parse(Output, "output: ~/x", source="r.yaml")


@pytest.mark.parametrize("case", NOT_AN_OVERRIDE)
def test_an_override_that_is_none_is_refused(case: str, tiny_page: Page) -> None:
    override, said = NOT_AN_OVERRIDE[case]
    with pytest.raises(ConfigError) as refused:
        recipe.parse(RunConfig, yaml.safe_dump(tiny_page), [override], source="r.yaml")
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_a_file_that_cannot_be_read_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(
        ConfigError, match=r"r\.yaml: the recipe cannot be read .*Give the path of a YAML file"
    ):
        recipe.load(RunConfig, path)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "+1e-3", ".1e-2", "1.e-3"])
def test_every_spelling_of_a_number_is_a_number(text: str) -> None:
    optimizer = recipe.parse(OptimizerConfig, f"learning_rate: {text}", source="r.yaml")
    assert optimizer.learning_rate == 1e-3
    assert recipe.parse(OptimizerConfig, "", [f"learning_rate={text}"], source="r.yaml") == optimizer


def test_overrides_apply_in_order_and_reach_blocks_that_the_recipe_left_out(tiny_page: Page) -> None:
    overrides = ["parallel.expert_parallel_size=4", "parallel.expert_parallel_size=2", "model.moe.top_k=4"]
    run = recipe.parse(RunConfig, yaml.safe_dump(tiny_page), overrides, source="r.yaml")
    assert (run.parallel.expert_parallel_size, run.model.moe and run.model.moe.top_k) == (2, 4)


def test_an_override_can_take_a_block_away(tiny_page: Page) -> None:
    overrides = ["model.moe=null", "model.intermediate_size=64"]
    run = recipe.parse(RunConfig, yaml.safe_dump(tiny_page), overrides, source="r.yaml")
    assert run.model.moe is None


def test_the_resolved_recipe_holds_every_default(tiny_page: Page) -> None:
    run = recipe.parse(RunConfig, yaml.safe_dump(tiny_page), source="r.yaml")
    page = yaml.safe_load(recipe.dump(run))
    assert page["train"]["optimizer"]["beta2"] == 0.95
    assert page["balance"]["sequence_loss_weight"] == 0.01


class Anything(Section):
    """What a dump must carry over."""

    word: str
    number: float
    count: int
    maybe: bool | None
    tree: dict[str, Any]


_words = st.text(max_size=12) | st.sampled_from(
    ["1e-3", "1E5", "null", "yes", "0x1f", "1:30", "a: b", "- a", "''"]
)
_numbers = st.floats(allow_nan=False, allow_infinity=False)
_leaves = st.none() | st.booleans() | st.integers() | _numbers | _words
_trees = st.dictionaries(_words, st.recursive(_leaves, lambda leaf: st.lists(leaf, max_size=3), max_leaves=6))


@given(word=_words, number=_numbers, count=st.integers(), maybe=st.none() | st.booleans(), tree=_trees)
@settings(deadline=None)
def test_parse_undoes_dump(
    word: str, number: float, count: int, maybe: bool | None, tree: dict[str, Any]
) -> None:
    section = Anything(word=word, number=number, count=count, maybe=maybe, tree=tree)
    assert recipe.parse(Anything, recipe.dump(section), source="dump") == section


@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
    learning_rate=st.floats(min_value=1e-12, max_value=1e3),
    num_experts=st.sampled_from([2, 6, 64]),
    deepspeed=_trees,
)
@settings(deadline=None)
def test_a_run_survives_its_own_recipe(
    name: str, learning_rate: float, num_experts: int, deepspeed: dict[str, Any]
) -> None:
    run = RunConfig(
        name=name,
        model=ModelConfig(
            vocab_size=512,
            hidden_size=32,
            num_layers=2,
            attention=AttentionConfig(num_heads=4),
            moe=MoEConfig(num_experts=num_experts, top_k=2, expert_intermediate_size=16),
        ),
        data=DataConfig(path="data/tiny", sequence_length=32),
        train=TrainConfig(
            steps=8,
            global_batch_size=8,
            micro_batch_size=2,
            optimizer=OptimizerConfig(learning_rate=learning_rate),
        ),
        deepspeed=deepspeed,
    )
    assert recipe.parse(RunConfig, recipe.dump(run), source="dump") == run
