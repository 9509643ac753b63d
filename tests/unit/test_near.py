"""Nearly equal documents are found as often as theory says, and every copy of short and unspaced texts."""

import random
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data_prep import shingles
from data_prep.clean import cleaner
from data_prep.documents import Document, Dropped, from_text
from data_prep.marks import bands
from data_prep.treatment import Clean, NearDuplicates
from data_prep.verdicts import _clusters, _first_of_alike
from moe.errors import DataError
from tests.unit.corpus import all_texts, prepared, write_jsonl

CONFIG = NearDuplicates()


def _bands(texts: list[str]) -> npt.NDArray[np.uint64]:
    known = shingles.WordHashes()
    return bands(*shingles.hashed([shingles.split(text) for text in texts], known), CONFIG)


def _jaccard(one: str, other: str) -> float:
    first, second = (
        {tuple(w[n : n + 5]) for n in range(len(w) - 4)} for w in map(shingles.split, (one, other))
    )
    return len(first & second) / len(first | second)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str, float]]:
    """Texts and copies with some words changed, and how alike they are."""
    draw = random.Random(0)
    vocabulary = [f"word{number}" for number in range(3000)]
    found = []
    for number in range(1500):
        words = draw.choices(vocabulary, k=draw.randrange(100, 400))
        copy = list(words)
        for _ in range(number % 14):
            copy[draw.randrange(len(copy))] = draw.choice(vocabulary)
        text, other = " ".join(words), " ".join(copy)
        found.append((text, other, _jaccard(text, other)))
    return found


def test_at_least_95_of_100_that_are_alike_are_found(pairs: list[tuple[str, str, float]]) -> None:
    marks = _bands([text for pair in pairs for text in pair[:2]])
    first = _first_of_alike([marks], np.ones(2 * len(pairs), dtype=bool))
    is_found = [bool(first[2 * n + 1] == 2 * n) for n in range(len(pairs))]
    alike = [found for found, pair in zip(is_found, pairs, strict=True) if 0.8 <= pair[2] < 1]
    assert len(alike) > 400
    assert np.mean(alike) >= 0.95
    for least, most in ((0.5, 0.6), (0.6, 0.7), (0.7, 0.8)):
        group = [
            (found, pair[2]) for found, pair in zip(is_found, pairs, strict=True) if least <= pair[2] < most
        ]
        theory = np.mean([1 - (1 - alike**CONFIG.rows) ** CONFIG.bands for _, alike in group])
        assert abs(np.mean([found for found, _ in group]) - theory) < 0.06 + 2 / np.sqrt(len(group))
    assert not any(first[0::2] != np.arange(0, len(first), 2))  # and nothing that is not


def test_marks_do_not_depend_on_neighbours(pairs: list[tuple[str, str, float]]) -> None:
    texts = [pair[0] for pair in pairs[:50]]
    alone = np.concatenate([_bands([text]) for text in texts], axis=1)
    assert np.array_equal(alone, _bands(texts))


def test_short_and_unspaced_copies_are_found_and_texts_without_words_are_left(tmp_path: Path) -> None:
    one = ["Yes.", "漢字", "我喜欢吃苹果和香蕉\uff0c也喜欢喝茶", "!!!", "日本語の文章はここにある。"]
    other = ["yes", "漢字 ", "我喜欢吃苹果和香蕉,也喜欢喝茶。", "???", "日本語の文章はここにある!"]
    path = write_jsonl(tmp_path / "a.jsonl", [*one, *other, *[f"filler {n}" for n in range(30)]])
    data = prepared(
        tmp_path,
        [{"type": "jsonl", "paths": [str(path)]}],
        duplicates={"near": {}},
        tokenizer={"type": "bpe", "vocab_size": 270},
        executor={"workers": 1},
    )
    assert all_texts(data) == sorted([*one, "???", *[f"filler {n}" for n in range(30)]])


def test_clusters_are_those_of_a_plain_search() -> None:
    draw = np.random.default_rng(0)
    for count in (1, 2, 10, 200):
        ties = draw.integers(0, count, size=(2, count // 2))
        expected = np.arange(count)
        for _ in range(count):
            for one, two in ties.T:
                expected[[one, two]] = min(expected[one], expected[two])
        assert np.array_equal(_clusters(ties, count), expected)


def test_one_band_after_the_other_makes_the_clusters_of_all_bands() -> None:
    draw = np.random.default_rng(1)
    for count, values in ((1, 2), (30, 40), (60, 40), (60, 400)):
        bands_BD = draw.integers(0, values, size=(4, count)).astype(np.uint64)
        in_question_D = draw.random(count) < 0.8
        expected = np.arange(count)
        for _ in range(count):
            for one, two in combinations(np.flatnonzero(in_question_D), 2):
                if ((bands_BD[:, one] == bands_BD[:, two]) & (bands_BD[:, one] != 0)).any():
                    expected[[one, two]] = min(expected[one], expected[two])
        halves = [bands_BD[:, : count // 2], bands_BD[:, count // 2 :]]
        assert np.array_equal(_first_of_alike(halves, in_question_D), expected)


def _clean(text: str, **settings: Any) -> Document | Dropped:
    found = from_text(text)
    assert isinstance(found, Document)
    return cleaner(Clean(**settings))(found)


def test_text_that_was_decoded_wrongly_is_mended() -> None:
    assert _clean("sÃ©ance â€œxâ€\x9d") == Document('séance "x"', 11)


def test_addresses_are_masked_the_same_whatever_came_before() -> None:
    text = "write to joe@firm.example or 8.8.8.8, not 10.0.0.1"
    clean = cleaner(Clean(mask_pii=True))
    found = from_text(text)
    assert isinstance(found, Document)
    first = clean(found)
    assert isinstance(first, Document)
    assert first == clean(found)
    assert "firm" not in first.text
    assert "8.8.8.8" not in first.text
    assert "10.0.0.1" in first.text


PROSE = (
    "The train waits at the signal with all of its lamps lit, and nobody on the platform knows for how long. "
    "It is said that the driver of the first one has left to have a cup of tea with the man in the box. "
    "A dog sleeps under the bench. Rain falls on the roof of the shed, and then it stops. "
    "Someone reads a letter aloud to the woman who sells flowers, although she cannot hear that well."
)


@pytest.mark.parametrize(
    ("rule", "text", "reason"),
    [
        ("gopher_quality", "too short", "gopher quality: gopher short doc"),
        ("gopher_repetition", "again and again\n" * 40, "gopher repetition: dup line frac"),
        ("c4_quality", PROSE + " lorem ipsum.", "c4 quality: lorem ipsum"),
        ("fineweb_quality", "no end\n" * 10, "fineweb quality: line punct ratio"),
    ],
)
def test_each_rule_drops_what_it_is_for_and_keeps_prose(rule: str, text: str, reason: str) -> None:
    assert _clean(text, rules=[rule]) == Dropped(reason, len(text))
    assert isinstance(_clean(PROSE, rules=[rule]), Document)


def test_languages_need_a_model_that_is_there() -> None:
    with pytest.raises(DataError, match=r"lid\.176\.bin.*leave clean\.language out"):
        cleaner(Clean.model_validate({"language": {"keep": ["en"], "model": "no/such.bin"}}))


class _FakeModel:
    """Says ja of a text with kana, and en of any other, as sure as its words are many."""

    def predict(self, text: str, k: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        assert "\n" not in text  # fastText raises
        label = "ja" if any("\u3040" <= letter <= "\u30ff" for letter in text) else "en"
        return (f"__label__{label}",), (min(1.0, len(text.split()) / 4),)


def test_documents_of_other_languages_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "lid.bin"
    model.write_bytes(b"a model")

    def load_model(path: str) -> _FakeModel:
        if Path(path).read_bytes() != b"a model":
            raise ValueError("it has wrong file format!")
        return _FakeModel()

    monkeypatch.setitem(sys.modules, "fasttext", SimpleNamespace(load_model=load_model))
    config = Clean.model_validate({"normalise": False, "language": {"keep": ["en"], "model": str(model)}})
    clean = cleaner(config)
    texts = ["four words\nof English", "ねこ が います よ", "too short"]
    kept = [clean(Document(text, len(text.encode()))) for text in texts]
    assert [getattr(item, "reason", "kept") for item in kept] == [
        "kept",
        "another language",
        "another language",
    ]
    model.write_bytes(b"something else")
    with pytest.raises(DataError, match="fastText cannot load this model"):
        cleaner(config)
    monkeypatch.setitem(sys.modules, "fasttext", None)
    with pytest.raises(
        DataError, match=r"clean\.language needs fasttext, .* pip install fasttext-numpy2-wheel"
    ):
        cleaner(config)
