"""Documents by address: what lists name is dropped and counted, from every source that tells addresses."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.treatment import UrlFilter
from data_prep.urls import PART, PLACE, SUSPECT, WORD, refuser
from tests.unit.corpus import (
    PREPARED,
    TEXTS,
    all_texts,
    page,
    prepared,
    refused,
    run,
    write_jsonl,
    write_text,
)

BLOCKED = "# domains and pages\nbad.example\nHTTPS://www.news.example/sport/\n\nsub.fair.example.\n"
WORDS = "# words\ncasino\nPoker\n"


def _lists(folder: Path) -> dict[str, Any]:
    write_text(folder / "block.txt", BLOCKED.encode())
    write_text(folder / "words.txt.gz", WORDS.encode())
    return {"block": [str(folder / "block.txt")], "words": [str(folder / "words.txt.gz")]}


ADDRESSES = {
    "https://bad.example": PLACE,
    "http://deep.down.BAD.example:8080/page?x=1": PLACE,
    "bad.example/without/a/scheme": PLACE,
    "https://user@bad.example./": PLACE,
    "https://notbad.example/": None,
    "https://bad.example.org/": None,
    "http://news.example/sport": PLACE,
    "https://www.news.example/sport/": PLACE,
    "https://www.news.example/sport/tennis": None,
    "https://fair.example/sub": None,
    "https://a.sub.fair.example/": PLACE,
    "https://fun.example/online-CASINO/": WORD,
    "https://fun.example/casinos": None,
    "https://poker.fun.example/": WORD,
    "http://[broken": None,
    "": None,
}


@pytest.mark.parametrize("url", ADDRESSES)
def test_an_address_is_refused_as_the_lists_say(tmp_path: Path, url: str) -> None:
    assert refuser(UrlFilter.model_validate(_lists(tmp_path)))(url) == ADDRESSES[url]


def _sources(folder: Path) -> list[dict[str, Any]]:
    """The first of each source is of a domain that is blocked, the second has a word; the third's address is null."""
    urls = ["https://x.bad.example/1", "https://ok.example/poker/", None, *["https://ok.example/3"] * 17]
    rows = [{"text": text, "url": url} for text, url in zip(TEXTS, urls * 3, strict=True)]
    write_text(folder / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows[:20]).encode())
    pq.write_table(pa.Table.from_pylist(rows[20:40]), folder / "b.parquet")
    (folder / "set").mkdir()
    write_text(folder / "set" / "c.jsonl", "".join(json.dumps(row) + "\n" for row in rows[40:]).encode())
    return [
        {"type": "jsonl", "paths": [str(folder / "a.jsonl")], "url_field": "url"},
        {"type": "parquet", "paths": [str(folder / "b.parquet")], "url_field": "url"},
        {"type": "hub", "dataset": str(folder / "set"), "url_field": "url"},
    ]


def test_every_source_that_tells_addresses_is_filtered_by_them(tmp_path: Path) -> None:
    settings = {"clean": {"urls": _lists(tmp_path)}, "executor": {"workers": 1}}
    sources = _sources(tmp_path)
    data = prepared(tmp_path, sources, **settings)
    for source in data.manifest.sources:
        assert {why: amount.documents for why, amount in source.dropped.items()} == {PLACE: 1, WORD: 1}
        assert source.read.documents == 20
    assert all_texts(data) == sorted(TEXTS[2:20] + TEXTS[22:40] + TEXTS[42:])
    assert "up to date" in run(tmp_path, page(tmp_path, sources, **settings)).stderr
    write_text(tmp_path / "block.txt", b"ok.example\n")
    refused(run(tmp_path, page(tmp_path, sources, **settings)), "lists or models that it names changed")
    assert run(tmp_path, page(tmp_path, sources, **settings), "--overwrite").exit_code == 0
    assert all_texts(data.open(tmp_path / PREPARED, verify=True)) == sorted(
        text for n, text in enumerate(TEXTS) if n % 20 in (0, 2)
    )


RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no address": ({}, {"block": ["block.txt"]}, "sources.0 (jsonl) tells none: give it a url_field"),
    "no filter": ({"url_field": "url"}, {}, "url_field 'url' of sources.0 has no effect without clean.urls"),
    "nothing to block": ({"url_field": "url"}, {"fineweb": False}, "nothing is dropped; remove the block"),
    "no list": ({"url_field": "url"}, {"block": ["no/such.txt"]}, "no/such.txt: no such file"),
    "an empty list": ({"url_field": "url"}, {"block": ["{}/none.txt"]}, "there is no entry in it"),
    "words that cannot be": (
        {"url_field": "url"},
        {"words": ["{}/block.txt"]},
        "'bad.example' can never stand",
    ),
    "no such key": ({"url_field": "link"}, {"block": ["{}/block.txt"]}, "there is no 'link' in this line"),
    "no string": (
        {"url_field": "n"},
        {"block": ["{}/block.txt"]},
        "'n' is 1, but an address must be a string",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_filter_that_cannot_work_is_refused(tmp_path: Path, case: str) -> None:
    field, urls, words = RECIPES[case]
    _lists(tmp_path)
    write_text(tmp_path / "none.txt", b"# nothing\n\n")
    source = {"type": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl"))], **field}
    said = {
        key: [path.format(tmp_path) for path in value] if isinstance(value, list) else value
        for key, value in urls.items()
    }
    settings = {"clean": {"urls": said}} if said else {"executor": {"workers": 1}}
    refused(run(tmp_path, page(tmp_path, [source], **settings)), words)


@pytest.mark.slow  # reads 4.6 million domains
def test_finewebs_lists_are_those_of_datatrove() -> None:
    pytest.importorskip("datatrove", reason="datatrove is an extra: pip install 'turnout[data]'")
    refuse = refuser(UrlFilter(fineweb=True))
    assert refuse("https://en.wikipedia.org/wiki/Turnout") is None
    assert refuse("https://www.pornhub.com/") == PLACE
    assert refuse("https://some.example/BDSM/index.html") == WORD
    assert refuse("https://some.example/free-xvideos2/") == PART
    assert refuse("https://some.example/nude-webcam/") == SUSPECT
