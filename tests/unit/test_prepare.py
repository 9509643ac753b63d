"""From sources of every kind to shards, and what a folder says of itself afterwards."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_prep import vocabulary
from data_prep.documents import Account, Document
from data_prep.recipe import BpeTokenizer, DataRecipe
from data_prep.stdlib import stdlib
from moe.data.shards import TokenData
from moe.recipe import load
from tests.unit.corpus import (
    PREPARED,
    TEXTS,
    all_texts,
    contents,
    page,
    prepared,
    refused,
    run,
    texts_in,
    write_jsonl,
    write_parquet,
    write_text,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
ODD = [
    "naïve café 漢字 🙂‍↔️",
    "<|endoftext|> is text here, so is <|pad|>",
    "tabs\tand\r\nlines \x00 end ",
    "\ufeffmark",
]


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = tmp_path_factory.mktemp("prepared")
    return prepared(folder, [{"type": "jsonl", "paths": [str(write_jsonl(folder / "a.jsonl", TEXTS + ODD))]}])


def test_every_text_comes_back_with_one_end_each(yard: TokenData) -> None:
    texts = texts_in(yard)
    assert sorted(texts["train"] + texts["validation"]) == sorted(TEXTS + ODD)
    assert yard.num_documents("train") + yard.num_documents("validation") == len(TEXTS + ODD)
    for split, kept in texts.items():
        assert yard.num_bytes(split) == sum(len(text.encode()) for text in kept)


def test_the_manifest_accounts_for_every_document_and_byte(tmp_path: Path) -> None:
    good, cut = ["one", "two, and é"], json.dumps({"text": "half \ud83d"})
    lines = [json.dumps({"text": text}) for text in [*TEXTS, *good, "", " \n\t", None]]
    raw = "\n".join([*lines, cut, ""]).encode() + b'{"text": "\xff\xfe"}\n\n'
    path = write_text(tmp_path / "a.jsonl", raw)
    data = prepared(tmp_path, [{"type": "jsonl", "paths": [str(path)]}])
    (facts,) = data.manifest.sources
    assert facts.tokens == data.num_tokens("train") + data.num_tokens("validation")
    kept = sum(len(text.encode()) for text in TEXTS + good)
    assert facts.read.model_dump() == {"documents": len(TEXTS) + 7, "bytes": kept + 3 + 0 + 8 + 14}
    assert facts.kept.model_dump() == {"documents": len(TEXTS) + 2, "bytes": kept}
    assert {reason: (amount.documents, amount.bytes) for reason, amount in facts.dropped.items()} == {
        "empty": (2, 3),
        "null": (1, 0),
        "invalid UTF-8": (2, 8 + 14),  # half a surrogate pair, and a line that is no text at all
    }


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_files_whole_or_cut_at_a_separator(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        write_text(tmp_path / "deep" / ("er" if number % 2 else "") / f"{number}.txt{suffix}", text.encode())
    write_text(
        tmp_path / f"many.story{suffix}", "<|endoftext|>".join([*ODD, ""]).replace(ODD[1], "x").encode()
    )
    data = prepared(
        tmp_path,
        [
            {
                "type": "text",
                "paths": [f"{tmp_path}/deep/**/*.txt{suffix}", f"{tmp_path}/deep/0.txt{suffix}"],
            },
            {"type": "text", "paths": [f"{tmp_path}/many.story{suffix}"], "separator": "<|endoftext|>"},
        ],
    )
    assert all_texts(data) == sorted([*TEXTS, ODD[0], "x", *ODD[2:]])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = write_jsonl(tmp_path / f"a{suffix}", TEXTS + ODD, field="content")
    data = prepared(tmp_path, [{"type": "jsonl", "paths": [str(path)], "text_field": "content"}])
    assert all_texts(data) == sorted(TEXTS + ODD)


def test_a_byte_order_mark_before_the_first_line_is_no_part_of_it(tmp_path: Path) -> None:
    for number, encoded in enumerate((write_jsonl(tmp_path / "x").read_bytes(), b'\n{"text": "one"}')):
        write_text(tmp_path / f"{number}.jsonl", b"\xef\xbb\xbf" + encoded)
    data = prepared(tmp_path, [{"type": "jsonl", "paths": [f"{tmp_path}/*.jsonl"]}])
    assert all_texts(data) == sorted([*TEXTS, "one"])


def test_parquet_with_every_kind_of_string(tmp_path: Path) -> None:
    import pyarrow as pa

    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for number, kind in enumerate(kinds):
        write_parquet(tmp_path / f"{number}.parquet", TEXTS[number::4], kind=kind)
    rows = [*(text.encode() for text in TEXTS[3::4]), b"\xff", None, b""]
    write_parquet(tmp_path / "3.parquet", rows, kind=pa.binary())
    data = prepared(tmp_path, [{"type": "parquet", "paths": [f"{tmp_path}/*.parquet"]}])
    assert all_texts(data) == sorted(TEXTS)
    assert {reason: a.documents for reason, a in data.manifest.sources[0].dropped.items()} == {
        "empty": 1,
        "invalid UTF-8": 1,
        "null": 1,
    }


def test_a_dataset_through_the_hubs_library(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    write_jsonl(tmp_path / "dataset" / "train.jsonl", [*TEXTS, None], field="story")
    source = {"type": "hub", "dataset": str(tmp_path / "dataset"), "text_field": "story"}
    assert all_texts(prepared(tmp_path, [source])) == sorted(TEXTS)
    (tmp_path / "less").mkdir()
    assert all_texts(prepared(tmp_path / "less", [source | {"max_documents": 50}])) == sorted(TEXTS[:50])


@pytest.mark.parametrize("executor", [None, {"workers": 1}], ids=["piece", "stages"])
def test_a_dataset_in_a_folder_that_changed_is_not_up_to_date(tmp_path: Path, executor: Any) -> None:
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", TEXTS)
    source = {"type": "hub", "dataset": str(tmp_path / "set")}
    recipe = page(tmp_path, [source], executor=executor)
    assert run(tmp_path, recipe).exit_code == 0
    assert "up to date" in run(tmp_path, recipe).stderr
    write_jsonl(tmp_path / "set" / "train.jsonl", TEXTS[1:])
    refused(run(tmp_path, recipe), "the text of the sources changed", "--overwrite")


def test_the_standard_library_is_enough_text_and_always_the_same() -> None:
    source = stdlib()
    documents = [item for item in source.items() if isinstance(item, Document)]
    assert sum(document.num_bytes for document in documents) > 8_000_000
    assert documents == [item for item in source.items() if isinstance(item, Document)]
    assert source.digest() == stdlib().digest()
    assert not [path for path in source.files if {"test", "tests", "site-packages"} & set(path.parts)]
    assert any(document.text.startswith('The "with" statement') for document in documents)


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path, yard: TokenData) -> None:
    path = write_jsonl(yard.folder.parent / "a.jsonl", TEXTS + ODD)
    again = prepared(tmp_path, [{"type": "jsonl", "paths": [str(path)]}])
    assert contents(again.folder) == contents(yard.folder)
    assert again.fingerprint == yard.fingerprint


def test_the_validation_split_does_not_depend_on_order_and_keeps_copies_together(
    tmp_path: Path, yard: TokenData
) -> None:
    backwards = write_jsonl(tmp_path / "b.jsonl", [*(TEXTS + ODD)[::-1], *TEXTS])
    data = prepared(tmp_path, [{"type": "jsonl", "paths": [str(backwards)]}])
    held_out = set(texts_in(yard)["validation"])
    assert set(texts_in(data)["validation"]) == held_out
    (tmp_path / "other").mkdir()
    source = {"type": "jsonl", "paths": [str(backwards)]}
    other = prepared(tmp_path / "other", [source], validation={"fraction": 0.2, "seed": 1})
    assert set(texts_in(other)["validation"]) != held_out


def test_without_a_fraction_there_is_no_validation_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    data = prepared(tmp_path, [{"type": "jsonl", "paths": [str(path)]}], validation={"fraction": 0})
    assert data.num_tokens("validation") == 0
    assert len(texts_in(data)["train"]) == len(TEXTS)


def test_shards_end_with_the_document_that_fills_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    data = prepared(tmp_path, [{"type": "jsonl", "paths": [str(path)]}], shard_tokens=200)
    shards = data.manifest.splits["train"].shards
    assert len(shards) > 3
    assert [shard.name for shard in shards[:2]] == ["train-00000", "train-00001"]
    assert all(200 <= shard.tokens < 300 for shard in shards[:-1])
    assert all_texts(data) == sorted(TEXTS)


def test_transformers_loads_the_tokenizer(yard: TokenData) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(yard.tokenizer_folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (yard.eos_id, yard.pad_id)
    assert len(tokenizer) == yard.vocab_size == 300
    for text in TEXTS[:3] + ODD:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def trained() -> vocabulary.Vocabulary:
    source = vocabulary.Source("texts", (), lambda: (Document(text, len(text)) for text in TEXTS))
    return vocabulary.train(BpeTokenizer(type="bpe", vocab_size=300), [source])


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text(alphabet="<|endoftxpa> \n"))
def test_every_string_survives_the_tokenizer(trained: vocabulary.Vocabulary, text: str) -> None:
    (ids,) = trained.encode([text])
    assert ids.index(trained.eos_id) == len(ids) - 1
    assert trained.tokenizer.decode(ids[:-1], skip_special_tokens=False) == text


@pytest.mark.parametrize("bare", [False, True])
def test_a_tokenizer_made_before_is_used_as_it_is(tmp_path: Path, yard: TokenData, bare: bool) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(yard.tokenizer_folder / "tokenizer.json"))
    tokenizer.enable_truncation(5)  # a setting for inference, which must not cut documents
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"type": "file", "path": str(folder)}
    if bare:
        settings = {"type": "file", "path": str(folder / "tokenizer.json"), "eos_token": "<|pad|>"}
    else:
        (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|pad|>"}, "kept": 1}')
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS + ODD)
    data = prepared(tmp_path, [{"type": "jsonl", "paths": [str(path)]}], tokenizer=settings)
    assert (data.eos_id, data.pad_id) == (1, 1)
    assert all_texts(data) == sorted(TEXTS + ODD)
    config = json.loads((data.tokenizer_folder / "tokenizer_config.json").read_text())
    assert config["eos_token"] == ("<|pad|>" if bare else {"content": "<|pad|>"})
    assert ("kept" in config) is not bare


def test_the_sample_takes_an_equal_share_of_each_source() -> None:
    letters = [
        vocabulary.Source(c, (), lambda c=c: (Document(c * 10**5, 10**5) for _ in range(50))) for c in "ab"
    ]
    accounts = {source: Account() for source in "ab"}
    sample = list(vocabulary._sample(letters, 10**6, accounts))
    assert [text[0] for text in sample] == ["a"] * 5 + ["b"] * 5
    assert [account.read["documents"] for account in accounts.values()] == [5, 5]


def test_a_second_run_finds_everything_up_to_date(tmp_path: Path) -> None:
    recipe = page(tmp_path, [{"type": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl"))]}])
    first = run(tmp_path, recipe)
    assert "yard is ready: vocabulary of 300 tokens" in first.stderr
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / PREPARED).rglob("*")}
    second = run(tmp_path, recipe)
    assert second.exit_code == 0
    assert "yard is up to date: nothing to do" in second.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / PREPARED).rglob("*")} == stamps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "recipe.yaml", PREPARED]


def test_overwrite_replaces_what_another_recipe_made(tmp_path: Path) -> None:
    recipe = page(tmp_path, [{"type": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl"))]}])
    run(tmp_path, recipe)
    assert run(tmp_path, recipe, "tokenizer.vocab_size=310", "--overwrite").exit_code == 0
    assert TokenData.open(tmp_path / PREPARED, verify=True).vocab_size == 310
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "recipe.yaml", PREPARED]


HALTS_AMID_ITS_WORK = """
import os, signal
from data_prep import prepare, run
encode = prepare.shares.encode

def encode_and_halt(*given):
    encode(*given)
    os.kill(os.getpid(), signal.SIGSTOP)

prepare.shares.encode = encode_and_halt
run.command()
"""


def test_a_killed_run_leaves_no_data_and_the_next_one_works(tmp_path: Path) -> None:
    tokenizer = {"type": "bpe", "vocab_size": 300, "sample_megabytes": 1}
    recipe = page(tmp_path, [{"type": "stdlib"}], tokenizer=tokenizer)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    process = subprocess.Popen(
        [sys.executable, "-c", HALTS_AMID_ITS_WORK, str(tmp_path / "recipe.yaml")], stderr=subprocess.DEVNULL
    )
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    unfinished = tmp_path / f".{PREPARED}.unfinished"
    assert any(unfinished.glob("train-*.bin"))
    busy = run(tmp_path, recipe)
    assert busy.exit_code == 2
    assert "another run is preparing this folder" in busy.stderr
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / PREPARED).exists()
    assert unfinished.exists()
    data = prepared(tmp_path, [{"type": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl"))]}])
    assert all_texts(data) == sorted(TEXTS)
    assert not unfinished.exists()


@pytest.mark.parametrize("name", ["stdlib", "files", "hub", "web"])
def test_the_recipes_we_ship_are_sound(name: str) -> None:
    assert load(DataRecipe, CONFIGS / f"{name}.yaml").folder.parent == Path("data")
