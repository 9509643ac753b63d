"""Values at and beyond the edge of what a recipe may hold: refused at once, in one short message."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe import recipe
from moe.config import RunConfig
from moe.config.base import LARGEST, brief, build
from moe.config.numbers import divisors
from moe.errors import ConfigError

Page = dict[str, Any]


def parse(page: Page, *overrides: str) -> RunConfig:
    return recipe.parse(RunConfig, recipe.yaml.safe_dump(page), overrides, source="recipe.yaml")


TOO_MUCH: dict[str, tuple[list[str], list[str]]] = {
    "huge batch": (
        ["train.global_batch_size=1000000000000000003"],
        ["global_batch_size is 1000000000000000003", "less than or equal to 2147483647"],
    ),
    "batch beyond a float": (
        ["train.global_batch_size=" + "9" * 20],
        ["global_batch_size is 9", "less than"],
    ),
    "huge depth": (["model.num_layers=" + "9" * 20], ["num_layers is 9", "less than or equal to 10000"]),
    "huge positions": (["model.max_sequence_length=" + "9" * 20], ["max_sequence_length is 9", "less than"]),
    "seed beyond 63 bits": (["seed=" + "9" * 40], ["seed is 9", "less than 9223372036854775808"]),
    "seed of many bits": (["seed=0x" + "f" * 5000], ["seed is a number of 20000 bits", "less than"]),
    "endless timeout": (["parallel.timeout_minutes=1e300"], ["timeout_minutes is 1e+300", "equal to 10080"]),
    "no timeout": (["parallel.timeout_minutes=1e-300"], ["timeout_minutes is 1e-300", "equal to 0.1"]),
    "timeout of many digits": (["parallel.timeout_minutes=" + "9" * 400], ["timeout_minutes is 99"]),
    "stage with a fraction": (["parallel.zero_stage=1.0"], ["zero_stage is 1.0", "0, 1, 2 or 3"]),
    "stage of a switch": (["parallel.zero_stage=true"], ["zero_stage is True", "0, 1, 2 or 3"]),
    "list of itself": (["seed=&x [*x]"], ["seed is [[[[...]]]]", "valid integer"]),
    "long name": (["name=" + "a" * 256], ["name is 'aaa", "at most 255 characters"]),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_a_value_beyond_its_range_is_refused_at_once(case: str, tiny_page: Page) -> None:
    overrides, said = TOO_MUCH[case]
    with pytest.raises(ConfigError) as refused:
        parse(tiny_page, *overrides)
    message = str(refused.value)
    assert [part for part in said if part not in message] == [], message
    assert len(message) < 400


BAD_PATHS = {
    "empty": ("''", "it must not be empty"),
    "blank": ("'  '", "it must not be empty"),
    "zero byte": (r'"a\0b"', "without zero bytes"),
    "home": ("~/x", "the shell expands ~ only at the start of a word"),
    "long": ("x/" + "a" * 256, "at most 255 bytes"),
    "long in bytes": ("ä" * 128, "at most 255 bytes"),
    "long in all": ("/a" * 2048, "4095 in all"),
    "half a character": (r'"\ud800"', "characters that a file name can hold"),
}


@pytest.mark.parametrize("setting", ["run_dir", "data.path"])
@pytest.mark.parametrize("case", BAD_PATHS)
def test_a_path_that_no_system_takes_is_refused(case: str, setting: str, tiny_page: Page) -> None:
    text, said = BAD_PATHS[case]
    with pytest.raises(ConfigError) as refused:
        parse(tiny_page, f"{setting}={text}")
    assert f"{setting} is '" in str(refused.value)
    assert said in str(refused.value)
    assert f"set {setting}=VALUE" in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_path_of_full_length_is_taken_as_it_stands(tiny_page: Page) -> None:
    path = "a" * 255 + "/b~/" + "ä" * 127
    assert str(parse(tiny_page, f"run_dir={path}").folder) == path


@pytest.mark.parametrize(
    "value",
    [
        [*range(100_000), "x"],
        {str(n): n for n in range(100_000)},
        "x" * 100_000,
        {"a" * 100_000: 1},
        10**5000,
        object,
    ],
    ids=["list", "block", "word", "key", "number", "class"],
)
def test_a_huge_value_is_shown_in_brief(value: object, tiny_page: Page) -> None:
    assert len(brief(value)) <= 60
    with pytest.raises(ConfigError) as refused:
        build(RunConfig, {**tiny_page, "name": value}, "recipe.yaml")
    assert "name is" in str(refused.value)
    assert len(str(refused.value)) < 300


def test_a_value_of_shared_lists_is_shown_at_once() -> None:
    value: list[object] = ["x"]
    for _ in range(60):
        value = [value] * 9
    assert len(brief(value)) <= 60


def test_of_very_many_faults_the_first_are_named(tiny_page: Page) -> None:
    with pytest.raises(ConfigError, match=r"and 981 more like these\.$") as refused:
        parse({**tiny_page, **{f"k{n}": n for n in range(1001)}})
    assert len(str(refused.value).splitlines()) == 21


@given(st.integers(1, 5000))
def test_divisors_are_all_that_divide(number: int) -> None:
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_divisors_of_the_largest_batch_are_found_at_once() -> None:
    assert divisors(LARGEST) == [1, LARGEST]
