"""Whose turn it is: shares, stages, epochs, layouts, resumed runs, and what is refused."""

import itertools
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe.config import DataConfig, RunConfig
from moe.data.mixture import Mixture, Stage
from moe.data.shards import TokenData
from moe.data.sources import Sources, open_sources
from moe.errors import ConfigError, DataError
from tests.unit.corpus import raw_data

LENGTH = 8
WEIGHT = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))
WEIGHTS = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(WEIGHT, min_size=n, max_size=n).filter(any), min_size=1, max_size=3)
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weights=WEIGHTS, start=st.integers(0, 150))
def test_counts_are_those_of_the_samples_one_by_one(weights: list[list[float]], start: int) -> None:
    mixture = Mixture([Stage(40 * place, tuple(given)) for place, given in enumerate(weights)])
    samples = mixture.stretch(0, 200)
    counts = [0] * len(weights[0])
    for number, (source, before) in enumerate(samples):
        assert mixture.counts(number) == counts
        assert before == counts[source]
        counts[source] += 1
    assert mixture.stretch(start, 50) == samples[start : start + 50]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(weights=st.lists(st.floats(0.02, 1.0), min_size=2, max_size=8))
def test_shares_are_the_weights_to_a_thousandth(weights: list[float]) -> None:
    mixture = Mixture([Stage(0, tuple(weights))])
    for samples in (20_000, 10**6, 10**9):
        for count, weight in zip(mixture.counts(samples), weights, strict=True):
            assert abs(count / samples - weight / sum(weights)) < 0.001
            if samples > 20_000:
                assert count / samples == pytest.approx(weight / sum(weights), rel=0.001)


def _folder(path: Path, first: int, tokens: int, vocab_size: int = 60_000) -> TokenData:
    """Documents of 5 tokens whose ids tell which they are."""
    ids = list(range(first, first + tokens))
    return raw_data(path, {"train": [ids[at : at + 5] for at in range(0, tokens, 5)]}, vocab_size=vocab_size)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, TokenData]:
    return {"a": _folder(tmp_path / "a", 10, 200), "b": _folder(tmp_path / "b", 1000, 75)}


def _config(folders: dict[str, TokenData], weights: Sequence[dict[str, Any]], **further: Any) -> DataConfig:
    sources = [
        {"name": name, "path": str(data.folder), **weight}
        for (name, data), weight in zip(folders.items(), weights, strict=True)
    ]
    page = {"path": str(folders["a"].folder), "sequence_length": LENGTH, "mixture": {"sources": sources}}
    return DataConfig.model_validate({**page, **further})


def _open(config: DataConfig, folders: dict[str, TokenData], steps: int = 10) -> Sources:
    return open_sources(config, folders["a"], global_batch_size=8, steps=steps, seed=3)


def _open_steps(config: DataConfig, folders: dict[str, TokenData], steps: int) -> Sources:
    """Of one sequence each."""
    return open_sources(config, folders["a"], global_batch_size=1, steps=steps, seed=3)


def _seen(
    config: DataConfig, sources: Sources, steps: range, world: int, micro: int
) -> list[list[list[int]]]:
    """By step, the rows that all ranks have, in order."""
    ranks = []
    for rank in range(world):
        batches = sources.batches(
            config,
            global_batch_size=8,
            micro_batch_size=micro,
            rank=rank,
            world_size=world,
            positions=slice(None),
            seed=3,
            start_step=steps.start,
        )
        ranks.append(list(itertools.islice(batches, len(steps))))
    return [
        [
            row
            for rank in ranks
            for batch in rank[step]
            for row in batch.input_ids_BS[batch.mask_BS.any(1)].tolist()
        ]
        for step in range(len(steps))
    ]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_mixture_is_the_same_for_every_layout_and_after_every_resume(
    folders: dict[str, TokenData], packing: str
) -> None:
    config = _config(
        folders, [{"weight": 3.0}, {"weight": 1.0}], packing=packing, attend_across_documents=False
    )
    sources = _open(config, folders)
    whole = _seen(config, sources, range(12), 1, 8)
    assert whole == _seen(config, sources, range(12), 8, 1)
    resized = [
        *_seen(config, sources, range(3), 2, 2),
        *_seen(config, sources, range(3, 7), 4, 1),
        *_seen(config, sources, range(7, 12), 1, 4),
    ]
    assert resized == whole


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_every_token_of_a_source_comes_once_an_epoch_whatever_becomes_of_the_run(
    folders: dict[str, TokenData], packing: str
) -> None:
    config = _config(
        folders, [{"epochs": 2.0}, {"epochs": 4.0}], packing=packing, attend_across_documents=False
    )
    sources = _open(config, folders, steps=2)
    rows = [round(use.samples / use.epochs) for use in sources.uses]
    steps = range(-(-4 * (rows[0] + 2 * rows[1]) // 8))
    cuts = [steps[:2], steps[2:5], steps[5:]]
    seen = [
        row
        for cut, world in zip(cuts, (1, 4, 2), strict=True)
        for step in _seen(config, sources, cut, world, 1)
        for row in step
    ]
    for name, first, count in (("a", 10, rows[0]), ("b", 1000, rows[1])):
        data = folders[name]
        here = [row for row in seen if first <= row[0] < first + data.num_tokens("train")]
        for epoch in range(len(here) // count):
            tokens = Counter(token for row in here[epoch * count : (epoch + 1) * count] for token in row)
            tokens.pop(1, None)  # padding
            assert tokens == Counter(range(first, first + data.num_tokens("train")))
        assert len(here) // count >= 2


def test_epochs_are_shares_of_a_run_as_long_as_they_last(folders: dict[str, TokenData]) -> None:
    config = _config(folders, [{"epochs": 2.0}, {"epochs": 6.0}])
    rows = [25, 10]  # ceil(199 / 8), ceil(74 / 8)
    steps = (2 * rows[0] + 6 * rows[1]) // 8
    uses = _open(config, folders, steps=steps).uses
    assert [use.epochs for use in uses] == pytest.approx([2.0, 6.0], abs=0.5)
    for more in (1, steps):
        with pytest.raises(
            ConfigError, match=rf"epochs of its sources make 110: .* Use at most {steps} train\.steps, or"
        ):
            _open(config, folders, steps=steps + more)


def test_a_source_alone_is_seen_as_often_as_it_asks_and_not_a_sequence_more(
    folders: dict[str, TokenData],
) -> None:
    config = _config({"a": folders["a"]}, [{"epochs": 1.16}])  # 29 of its 25 sequences
    _open_steps(config, folders, 29)
    with pytest.raises(ConfigError, match=r"30 steps see 30 sequences, .* Use at most 29 train\.steps"):
        _open_steps(config, folders, 30)


def test_a_source_is_not_used_more_often_than_it_may_be(folders: dict[str, TokenData]) -> None:
    config = _config(folders, [{"weight": 1.0, "max_epochs": 3.0}, {"weight": 1.0}])
    _open(config, folders, steps=10)
    with pytest.raises(
        ConfigError, match=r"11 steps would see source b 4\.40 times \(44 of its 10 sequences\)"
    ):
        _open(config, folders, steps=11)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    limits=st.tuples(st.floats(0.3, 4.0), st.floats(0.3, 4.0)),
    begins=st.lists(st.integers(1, 39), max_size=2, unique=True),
    weights=st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)), min_size=3, max_size=3),
)
def test_as_many_steps_as_the_refusal_allows_are_allowed_and_no_more(
    folders: dict[str, TokenData],
    limits: tuple[float, float],
    begins: list[int],
    weights: list[tuple[float, float]],
) -> None:
    """Shares that change in the course of a run are not used up in proportion to its length."""
    page = _config(folders, [{"max_epochs": limit} for limit in limits]).model_dump()
    page["mixture"]["stages"] = [
        {"from_step": step, "weights": dict(zip("ab", here, strict=True))}
        for step, here in zip([0, *sorted(begins)], weights, strict=False)
    ]
    config = DataConfig.model_validate(page)
    try:
        _open(config, folders, steps=60)
    except ConfigError as error:
        for most in {int(found) for found in re.findall(r"at most (\d+) train\.steps", str(error))}:
            assert most > max([0, *begins])  # or a stage would have no effect
            _open(config, folders, steps=most)
            with pytest.raises(ConfigError, match="would see source"):
                _open(config, folders, steps=most + 1)


def test_stages_change_the_shares_at_their_steps(folders: dict[str, TokenData]) -> None:
    config = _config(folders, [{}, {"max_epochs": 9.0}])
    page = config.model_dump()
    page["mixture"]["stages"] = [
        {"from_step": 0, "weights": {"a": 1.0}},
        {"from_step": 2, "weights": {"b": 1.0}},
        {"from_step": 5, "weights": {"a": 1.0, "b": 3.0}},
    ]
    config = DataConfig.model_validate(page)
    sources = _open(config, folders)
    shares = [sum(row[0] >= 1000 for row in step) for step in _seen(config, sources, range(9), 1, 8)]
    assert shares[:5] == [0, 0, 8, 8, 8]
    assert 22 <= sum(shares[5:]) <= 26


def test_a_step_far_away_is_there_at_once_and_there_is_no_state(folders: dict[str, TokenData]) -> None:
    config = _config(folders, [{"weight": 0.7}, {"weight": 0.3, "max_epochs": 1e9}])
    page = config.model_dump()
    page["mixture"]["sources"][0]["max_epochs"] = 1e9
    config = DataConfig.model_validate(page)
    _seen(config, _open(config, folders), range(1), 1, 8)
    began = time.process_time()
    sources = _open(config, folders, steps=2_000_000)
    assert len(_seen(config, sources, range(1_000_000, 1_000_001), 1, 8)[0]) == 8
    assert time.process_time() - began < 1.0


def test_a_source_of_another_tokenizer_is_refused(folders: dict[str, TokenData], tmp_path: Path) -> None:
    folders = {**folders, "b": _folder(tmp_path / "other", 1000, 75, vocab_size=50_000)}
    with pytest.raises(DataError, match=r"source b of data\.mixture has another tokenizer"):
        _open(_config(folders, [{"weight": 1.0}, {"weight": 1.0}]), folders)


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ([{"weight": 1.0}, {}], "must all have a weight, or all have epochs"),
        ([{"weight": 1.0}, {"epochs": 1.0}], "must all have a weight, or all have epochs"),
        ([{"weight": 1.0, "epochs": 1.0}] * 2, "must all have a weight, or all have epochs"),
        ([{"weight": 1.0, "name": "a"}] * 2, "names a 2 times"),
        ([{"weight": 0.0}, {"weight": 1.0}], "greater than 0"),
        ([], "at least 1 item"),
    ],
)
def test_sources_whose_shares_are_not_defined_are_refused(
    mixture: list[dict[str, Any]], words: str, tiny_page: dict[str, Any]
) -> None:
    sources = [{"name": f"s{at}", "path": "p", **given} for at, given in enumerate(mixture)]
    _refused(tiny_page, {"sources": sources}, words)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"from_step": 1, "weights": {"a": 1.0}}], "the first must begin at 0"),
        ([{"from_step": 0, "weights": {"a": 1.0}}] * 2, "each of the others later"),
        ([{"from_step": 0, "weights": {"c": 1.0}}], "a weight of c, which is no source. Sources are a, b"),
        ([{"from_step": 0, "weights": {"a": 0.0}}], "no weight above 0"),
        (
            [{"from_step": 0, "weights": {"a": 1.0}}, {"from_step": 10**6, "weights": {"b": 1.0}}],
            "so it has no effect",
        ),
        ([{"from_step": 0, "weights": {"a": 1.0, "b": 0.0}}], "source b has no weight in any of them"),
    ],
)
def test_stages_that_contradict_themselves_are_refused(
    stages: list[dict[str, Any]], words: str, tiny_page: dict[str, Any]
) -> None:
    sources = [{"name": name, "path": "p"} for name in ("a", "b")]
    _refused(tiny_page, {"sources": sources, "stages": stages}, words)
    sources[0]["weight"] = 1.0  # type: ignore[assignment]  # a page
    _refused(tiny_page, {"sources": sources, "stages": [stages[0]]}, "which then has no effect")


def _refused(page: dict[str, Any], mixture: dict[str, Any], words: str) -> None:
    from moe.config.base import build

    page["data"]["mixture"] = mixture
    with pytest.raises(ConfigError, match=words):
        build(RunConfig, page, "recipe")
