"""A recipe, a source or a tokenizer that cannot be used: one message, with the way out, and nothing left behind."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from data_prep.run import command
from tests.unit.corpus import (
    PREPARED,
    TEXTS,
    all_texts,
    contents,
    cut,
    flip,
    page,
    prepared,
    refused,
    run,
    write_jsonl,
    write_parquet,
    write_text,
)

# Recipes

SOUND = {
    "name": "x",
    "sources": [{"type": "stdlib"}],
    "tokenizer": {"type": "bpe", "vocab_size": 300},
}

RECIPES: dict[str, tuple[dict[str, Any] | str, tuple[str, ...]]] = {
    "an unknown key": (SOUND | {"validaton": {}}, ("validaton", "did you mean validation?")),
    "an unknown key of one source": (
        SOUND | {"sources": [{"type": "jsonl", "paths": ["a"], "text_feild": "t"}]},
        ("sources.0", "text_feild", "text_field?"),
    ),
    "an option of another source": (
        SOUND | {"sources": [{"type": "stdlib", "separator": "x"}]},
        ("sources.0", "separator", "no such setting"),
    ),
    "an unknown source": (SOUND | {"sources": [{"type": "jsnl"}]}, ("jsnl", "'jsonl'", "'parquet'")),
    "a source without a type": (SOUND | {"sources": [{"paths": ["a"]}]}, ("sources.0", "type")),
    "no source": (SOUND | {"sources": []}, ("sources is []", "at least 1")),
    "no path": (SOUND | {"sources": [{"type": "text", "paths": []}]}, ("paths is []", "at least 1")),
    "a vocabulary without merges": (
        SOUND | {"tokenizer": {"type": "bpe", "vocab_size": 258}},
        ("vocab_size is 258", "259"),
    ),
    "a vocabulary beyond all memory": (
        SOUND | {"tokenizer": {"type": "bpe", "vocab_size": 10**9}},
        ("vocab_size is 1000000000", "less than or equal to 1000000"),
    ),
    "pairs too frequent to count": (
        SOUND | {"tokenizer": {"type": "bpe", "vocab_size": 300, "min_frequency": 10**30}},
        ("min_frequency is 1000", "less than or equal to 1000000000"),
    ),
    "an output that is no path": (SOUND | {"output": "a\0b"}, ("output is 'a\\x00b'", "without zero bytes")),
    "an empty output": (SOUND | {"output": ""}, ("output is ''", "must not be empty")),
    "a source that is no path": (
        SOUND | {"sources": [{"type": "text", "paths": ["a\0b/*"]}]},
        ("sources.0.paths.0 is 'a\\x00b/*'", "without zero bytes"),
    ),
    "an option of the other tokenizer": (
        SOUND | {"tokenizer": {"type": "file", "path": "a", "vocab_size": 300}},
        ("vocab_size", "no such setting"),
    ),
    "more processes than any machine has": (
        SOUND | {"executor": {"workers": 10**7}},
        ("executor.workers is 10000000", "1000"),
    ),
    "more bands than memory holds": (
        SOUND | {"duplicates": {"near": {"bands": 10**9}}},
        ("duplicates.near.bands is 1000000000", "1000"),
    ),
    "a fraction of one": (
        SOUND | {"validation": {"fraction": 1.0}},
        ("validation.fraction is 1.0", "less than 1"),
    ),
    "a seed without effect": (
        SOUND | {"validation": {"fraction": 0, "seed": 3}},
        ("seed 3 has no effect with fraction 0",),
    ),
    "a shard of nothing": (SOUND | {"shard_tokens": 0}, ("shard_tokens is 0", "greater than 0")),
    "a name that is a path": (SOUND | {"name": "a/b"}, ("name is 'a/b'",)),
    "not YAML": ("name: [x", ("not YAML",)),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_broken_recipe_is_refused(tmp_path: Path, case: str) -> None:
    recipe, words = RECIPES[case]
    refused(run(tmp_path, recipe), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(CliRunner().invoke(command, [str(tmp_path / "none.yaml")]), "none.yaml", "cannot be read")


# Sources


SOURCES: dict[str, tuple[str, Callable[[Path], Any], tuple[str, ...]]] = {
    "nothing matches": ("text", lambda folder: None, ("a.text: no such file",)),
    "a folder": (
        "text",
        lambda folder: (folder / "a.text").mkdir(),
        ("a.text: only folders match", "folder/*"),
    ),
    "a cut gz": (
        "jsonl.gz",
        lambda folder: cut(write_jsonl(folder / "a.jsonl.gz")),
        ("a.jsonl.gz", "cannot be read to its end", "copy it again"),
    ),
    "a flipped byte in a gz": (
        "jsonl.gz",
        lambda folder: flip(write_jsonl(folder / "a.jsonl.gz"), -6),
        ("a.jsonl.gz", "cannot be read to its end", "CRC"),
    ),
    "a gz that is none": (
        "text.gz",
        lambda folder: (folder / "a.text.gz").write_bytes(b"plain"),
        ("a.text.gz", "Not a gzipped file"),
    ),
    "a cut zst": (
        "jsonl.zst",
        lambda folder: cut(write_jsonl(folder / "a.jsonl.zst")),
        ("a.jsonl.zst", "the last zstd frame has no end", "copy it again"),
    ),
    "a zst that is none": (
        "text.zst",
        lambda folder: (folder / "a.text.zst").write_bytes(b"plain text"),
        ("a.text.zst", "cannot be read to its end"),
    ),
    "a cut parquet": (
        "parquet",
        lambda folder: cut(write_parquet(folder / "a.parquet")),
        ("a.parquet: this parquet file cannot be read", "copy it again"),
    ),
    "a flipped page header in a parquet": (
        "parquet",
        lambda folder: flip(write_parquet(folder / "a.parquet"), 5),
        ("a.parquet: this parquet file cannot be read",),
    ),
    "no such column": (
        "parquet",
        lambda folder: write_parquet(folder / "a.parquet", field="content"),
        ("a.parquet: there is no column 'text', only 'content', 'n'", "text_field"),
    ),
    "a column of numbers": (
        "parquet",
        lambda folder: write_parquet(folder / "a.parquet", [1, 2]),
        ("column 'text' holds int64", "text_field"),
    ),
    "no such key": (
        "jsonl",
        lambda folder: write_jsonl(folder / "a.jsonl", field="content"),
        ("a.jsonl:1: there is no 'text' in this line, only 'content', 'n'", "text_field"),
    ),
    "a key of numbers": (
        "jsonl",
        lambda folder: write_jsonl(folder / "a.jsonl", ["x", 7]),
        ("a.jsonl:2: 'text' is 7", "must be a string"),
    ),
    "a cut last line": (
        "jsonl",
        lambda folder: cut(write_jsonl(folder / "a.jsonl"), 0.995),
        ("a.jsonl:60: this line is not JSON", "Mend or remove it"),
    ),
    "a line that is a list": (
        "jsonl",
        lambda folder: write_text(folder / "a.jsonl", b"[1, 2]\n"),
        ("a.jsonl:1: there is no 'text' in this line, only no object but [1, 2]",),
    ),
    "two columns of one name": (
        "parquet",
        lambda folder: pq.write_table(
            pa.Table.from_arrays([pa.array(TEXTS)] * 2, names=["text"] * 2), folder / "a.parquet"
        ),
        ("a.parquet: there are 2 columns 'text'", "Rename or remove"),
    ),
    "lines in UTF-16": (
        "jsonl",
        lambda folder: (folder / "a.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16")),
        ("a.jsonl: this is no JSON but UTF-16", "convert it to UTF-8"),
    ),
    "a gz that does not say so": (
        "jsonl",
        lambda folder: write_jsonl(folder / "b.jsonl.gz").rename(folder / "a.jsonl"),
        ("a.jsonl: this is no JSON but compressed by gzip", "should end in .gz"),
    ),
    "a gz cut to nothing": (
        "jsonl.gz",
        lambda folder: (folder / "a.jsonl.gz").touch(),
        ("a.jsonl.gz: this file cannot be read to its end", "it is empty", "copy it again"),
    ),
    "a link that leads nowhere": (
        "jsonl",
        lambda folder: (folder / "a.jsonl").symlink_to("b.jsonl"),
        ("a.jsonl: this link leads to", "b.jsonl, where nothing is"),
    ),
    "a pipe": (
        "jsonl",
        lambda folder: os.mkfifo(folder / "a.jsonl"),
        ("a.jsonl: this is no file but a pipe or a device", "Write it to a file"),
    ),
    "only dropped documents": (
        "text",
        lambda folder: write_text(folder / "a.text", b"\xff\xff"),
        ("no usable text: 1 documents read, none kept (dropped: 1 invalid UTF-8)",),
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_that_cannot_be_used_is_refused(tmp_path: Path, yard_tokenizer: Path, case: str) -> None:
    suffix, make, words = SOURCES[case]
    make(tmp_path)
    source = {"type": suffix.partition(".")[0], "paths": [str(tmp_path / f"a.{suffix}")]}
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run(tmp_path, page(tmp_path, [source], tokenizer={"type": "file", "path": str(yard_tokenizer)}))
    refused(result, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "recipe.yaml"])


def test_a_file_is_read_once_by_whatever_links_it_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl")
    (folder / "0").symlink_to(folder)
    (folder / "0.jsonl").symlink_to("a.jsonl")
    for name, workers in (("plain", None), ("staged", {"workers": 1})):
        (tmp_path / name).mkdir()
        source = {"type": "jsonl", "paths": [f"{folder}/**/*.jsonl", str(folder / "a.jsonl")]}
        data = prepared(tmp_path / name, [source], executor=workers)
        assert data.manifest.sources[0].read.documents == len(TEXTS)


@pytest.mark.parametrize("settings", [{}, {"executor": {"workers": 1}}])
def test_two_sources_that_read_the_same_file_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    sources = [{"type": "jsonl", "paths": [paths]} for paths in (f"{tmp_path}/*.jsonl", str(path))]
    refused(run(tmp_path, page(tmp_path, sources, **settings)), "a.jsonl: sources.0 and sources.1 both read")
    other_field = {**sources[1], "text_field": "title"}
    path.write_text("".join(json.dumps({"text": text, "title": text[::-1]}) + "\n" for text in TEXTS))
    data = prepared(tmp_path, [sources[0], other_field], **settings)
    assert [source.read.documents for source in data.manifest.sources] == [60, 60]


@pytest.mark.parametrize("gone", [None, PREPARED])
def test_a_recipe_does_not_read_what_it_made(tmp_path: Path, gone: str | None) -> None:
    (tmp_path / "a.jsonl").write_bytes(write_jsonl(tmp_path / "a.jsonl").read_bytes() + b"no row\n")
    source = {"type": "jsonl", "paths": [f"{tmp_path}/**/*.jsonl"]}
    settings = {"bad_rows": "quarantine", "executor": {"workers": 1}}
    before = contents(prepared(tmp_path, [source], **settings).folder)
    if gone:
        shutil.rmtree(tmp_path / gone)
    for options in ((), ("--overwrite",), ("--dry-run",)):
        result = run(tmp_path, page(tmp_path, [source], **settings), *options)
        refused(result, "quarantine.jsonl: sources.0 reads", "own output", "narrower")
    assert gone or contents(tmp_path / PREPARED) == before


def test_sources_of_which_nothing_stays_are_refused_with_the_reasons(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one two three four", "two three four five"])
    recipe = page(
        tmp_path,
        [{"type": "jsonl", "paths": [str(path)]}],
        decontaminate={"paths": [str(path)], "words": 3},
        executor={"workers": 1},
    )
    refused(run(tmp_path, recipe), "none of 2 documents stays: 2 contaminated", "are the sources its tests?")


def test_a_name_with_the_signs_of_a_pattern_is_a_name_where_nothing_matches_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a [1]*?.jsonl")
    assert all_texts(prepared(tmp_path, [{"type": "jsonl", "paths": [str(path)]}])) == sorted(TEXTS)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the disk does not take such a name")
def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / os.fsdecode(b"a\xff.jsonl"))
    source = {"type": "jsonl", "paths": [f"{tmp_path}/*.jsonl"]}
    refused(run(tmp_path, page(tmp_path, [source])), "a\\udcff.jsonl", "not UTF-8")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.text").write_text(text, encoding="utf-8-sig")
    (tmp_path / "more.csv").write_text("x,y", encoding="utf-8-sig")
    data = prepared(
        tmp_path,
        [
            {"type": "text", "paths": [f"{tmp_path}/*.text"]},
            {"type": "text", "paths": [f"{tmp_path}/more.csv"], "separator": ","},
        ],
    )
    assert all_texts(data) == sorted([*TEXTS, "x", "y"])


@pytest.mark.skipif(sys.platform != "linux", reason="there is such a file on Linux alone")
@pytest.mark.parametrize("settings", [{}, {"executor": {"workers": 1}}])
def test_a_file_that_the_system_does_not_let_us_read_is_one_error(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    recipe = page(tmp_path, [{"type": "text", "paths": ["/proc/self/mem"]}], **settings)
    refused(run(tmp_path, recipe), "Input/output error", "permissions")


def test_a_dataset_out_of_reach_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    result = run(tmp_path, page(tmp_path, [{"type": "hub", "dataset": "a/b"}]))
    refused(result, "a/b: the dataset cannot be read (ConnectionError: Couldn't reach", "the network")


def test_a_dataset_without_the_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    write_jsonl(tmp_path / "dataset" / "train.jsonl", field="story")
    source = {"type": "hub", "dataset": str(tmp_path / "dataset")}
    refused(run(tmp_path, page(tmp_path, [source])), "there is no column 'text', only 'story', 'n'")
    result = run(tmp_path, page(tmp_path, [source | {"split": "tset"}]))
    refused(result, "the dataset cannot be read", "tset")


# Tokenizers and splits


@pytest.fixture(scope="module")
def yard_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    source = {"type": "jsonl", "paths": [str(write_jsonl(folder / "a.jsonl"))]}
    return prepared(folder, [source]).tokenizer_folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"type": "bpe", "vocab_size": 5000}, ("vocab_size is 5000", "tokens only", "vocab_size=")),
        ({"type": "file", "path": "{}/none"}, ("none: there is no tokenizer.json",)),
        ({"type": "file", "path": "{}/broken"}, ("this is not a tokenizer", "Save it again")),
        (
            {"type": "file", "path": "{}/yard", "eos_token": "</s>"},
            ("no token '</s>'", "tokenizer.eos_token"),
        ),
        ({"type": "file", "path": "{}/yard", "pad_token": "<p>"}, ("no token '<p>'", "tokenizer.pad_token")),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(
    tmp_path: Path, yard_tokenizer: Path, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    home = tmp_path / "tokenizers"
    shutil.copytree(yard_tokenizer, home / "yard")
    (home / "broken").mkdir()
    (home / "broken" / "tokenizer.json").write_text('{"model": 3}')
    path = write_jsonl(tmp_path / "a.jsonl")
    recipe = page(tmp_path, [{"type": "jsonl", "paths": [str(path)]}])
    recipe["tokenizer"] = {
        key: str(value).format(home) if key == "path" else value for key, value in settings.items()
    }
    refused(run(tmp_path, recipe), *words)
    assert not (tmp_path / PREPARED).exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([b""], ("no usable text: 1 documents read, none kept (dropped: 1 empty)", "Give sources with text")),
        ([b" \n\t", b"\n", b"\xff"], ("3 documents read, none kept (dropped: 2 empty, 1 invalid UTF-8)",)),
        ([b"a"], ("no two letters stand side by side 2 times", "the 1 bytes of text in 1 documents")),
    ],
    ids=["empty", "blank or no UTF-8", "one letter"],
)
def test_text_that_a_tokenizer_cannot_be_trained_on_is_refused(
    tmp_path: Path, files: list[bytes], words: tuple[str, ...]
) -> None:
    for number, raw in enumerate(files):
        write_text(tmp_path / f"{number}.txt", raw)
    refused(run(tmp_path, page(tmp_path, [{"type": "text", "paths": [f"{tmp_path}/*.txt"]}])), *words)
    assert not (tmp_path / PREPARED).exists()


def test_json_lines_without_a_line_are_refused(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.jsonl", b"\n")
    result = run(tmp_path, page(tmp_path, [{"type": "jsonl", "paths": [str(path)]}]))
    refused(result, "no usable text: 0 documents read, none kept (there are none in them)")


def test_the_root_of_all_folders_is_no_output(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    recipe = page(tmp_path, [{"type": "jsonl", "paths": [str(path)]}], output="/")
    refused(run(tmp_path, recipe, "--overwrite"), "/: the output is the root of all folders")


@pytest.mark.parametrize(("fraction", "split"), [(1e-9, "validation"), (0.999999, "train")])
def test_a_split_that_stays_empty_is_refused(tmp_path: Path, fraction: float, split: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    recipe = page(tmp_path, [{"type": "jsonl", "paths": [str(path)]}], validation={"fraction": fraction})
    refused(run(tmp_path, recipe), "validation.fraction is", f"of 60 documents, none fell to {split}")
    assert not (tmp_path / PREPARED).exists()
