"""The fast encoder gives what `tokenizers` gives, or is not used; damaged bytes are named to the block."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import encoder, vocabulary
from data_prep.documents import Document, Source
from data_prep.encoder import Encoder
from data_prep.recipe import BpeTokenizer
from data_prep.stdlib import stdlib
from data_prep.verbs import command
from data_prep.vocabulary import Vocabulary
from moe.data.manifest import BLOCK_BYTES
from moe.data.shards import TOKENIZER_NAME, TokenData
from moe.errors import DataError
from tests.unit.corpus import TEXTS, flip, prepared, raw_data, write_jsonl

gigatoken = pytest.importorskip("gigatoken")


@pytest.fixture(scope="module")
def trained() -> Vocabulary:
    config = BpeTokenizer(type="bpe", vocab_size=2000, sample_megabytes=1)
    return vocabulary.train(config, [stdlib()])


@pytest.fixture(scope="module")
def fast(trained: Vocabulary) -> Encoder:
    return Encoder(trained)


def _rows(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    found = encoder.encode([text.encode() for text in texts])
    assert found.lengths_D.sum() == len(found.ids_N)
    return [part.tolist() for part in np.split(found.ids_N, np.cumsum(found.lengths_D)[:-1])]


def test_the_fast_encoder_is_taken_for_our_own_tokenizer(fast: Encoder) -> None:
    assert fast.name == "gigatoken"


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_has_the_ids_of_tokenizers(trained: Vocabulary, fast: Encoder, texts: list[str]) -> None:
    assert _rows(fast, texts) == trained.encode(texts)


def test_real_text_has_the_ids_of_tokenizers(trained: Vocabulary, fast: Encoder) -> None:
    texts = [item.text for item in stdlib().items() if isinstance(item, Document)][::8]
    assert sum(map(len, texts)) > 1_000_000
    assert _rows(fast, texts) == trained.encode(texts)


def test_characters_that_only_one_library_takes_for_letters_have_the_ids_of_tokenizers() -> None:
    text = ' "\ua7cf",' * 50
    source = Source("young", (), lambda: iter([Document(text, len(text.encode()))]))
    config = BpeTokenizer(type="bpe", vocab_size=264, sample_megabytes=1, min_frequency=1)
    young = vocabulary.train(config, [source])
    found = Encoder(young)
    assert found.name == "gigatoken"
    assert found._fast is not None
    (theirs,) = young.encode([text])
    assert [*found._fast.encode(text.encode()).tolist(), young.eos_id] != theirs, "it sees it otherwise"
    assert _rows(found, [text, "a"]) == young.encode([text, "a"])


def test_names_of_special_tokens_in_a_text_are_text(trained: Vocabulary, fast: Encoder) -> None:
    (row,) = _rows(fast, ["a<|endoftext|>b<|pad|>"])
    assert row.count(trained.eos_id) == 1
    assert row[-1] == trained.eos_id


def test_without_gigatoken_the_ids_are_the_same(trained: Vocabulary, fast: Encoder) -> None:
    slow = Encoder(trained, fast=False)
    assert slow.name == "tokenizers"
    assert _rows(slow, TEXTS) == _rows(fast, TEXTS)


class _Wrong:
    """A gigatoken that is wrong about texts with the word `never`."""

    def __init__(self, true: Any) -> None:
        self._true = true

    def encode(self, text: bytes) -> Any:
        return self._true.encode(text.replace(b"never", b"ever"))


def test_a_fast_encoder_that_differs_in_the_work_stops_it(
    trained: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Encoder(trained)
    monkeypatch.setattr(found, "_fast", _Wrong(found._fast))
    with pytest.raises(DataError, match=r"set tokenizer\.fast=false"):
        found.encode([f"never {number}".encode() for number in range(5000)])


def test_a_fast_encoder_that_fails_a_probe_is_not_used(
    trained: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "_encoded", lambda fast, texts: [np.zeros(1)] * len(texts))
    assert Encoder(trained).name == "tokenizers"


@pytest.mark.parametrize("trials", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_flipped_or_cut_byte_is_named_to_the_block(tmp_path: Path, trials: int) -> None:
    documents = [list(range(50_000)) for _ in range(30)]
    data = raw_data(tmp_path / "raw", {"train": documents}, vocab_size=50_000, shard_tokens=10**6)
    (data.folder / TOKENIZER_NAME).mkdir()
    shards = sorted([*data.folder.glob("*.bin"), *data.folder.glob("*.idx")])
    draw = random.Random(0)
    for trial in range(trials):
        path = draw.choice(shards)
        whole = path.read_bytes()
        at = draw.randrange(len(whole))
        if trial % 2:
            flip(path, at)
        else:
            path.write_bytes(whole[:at])
        result = CliRunner().invoke(command, ["verify", str(data.folder)])
        path.write_bytes(whole)
        assert result.exit_code == 2
        assert f"{path}: " in result.stderr
        assert f"block {at // BLOCK_BYTES + 1} " in result.stderr
    assert CliRunner().invoke(command, ["verify", str(data.folder)]).exit_code == 0


def test_a_folder_tells_what_is_in_it(tmp_path: Path) -> None:
    data: TokenData = prepared(
        tmp_path, [{"type": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl"))]}]
    )
    said = CliRunner().invoke(command, ["sample", str(data.folder), "-n", "3"])
    assert said.exit_code == 0
    assert sum(text in said.stdout for text in TEXTS) == 3
    for verb in ("stats", "inspect"):
        assert (
            '"documents": 60' in CliRunner().invoke(command, [verb, str(data.folder)]).stdout
            or verb == "inspect"
        )
