"""The report of a data folder: its figures are the manifest's, its examples are text and nothing else."""

import json
from html.parser import HTMLParser
from pathlib import Path

from data_prep.folder import shares
from data_prep.report import HTML_NAME, JSON_NAME
from moe.data.shards import TokenData
from tests.unit.corpus import TEXTS, prepared, write_jsonl


class _Reader(HTMLParser):
    """Tags that stand open, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _read(data: TokenData) -> str:
    reader = _Reader()
    reader.feed((data.folder / HTML_NAME).read_text(encoding="utf-8"))
    assert reader.open == []
    assert "script" not in reader.seen
    return reader.text


EVIL = "<script>alert('$name')</script> 漢字 \U0001f642"


def test_a_staged_report_accounts_for_all_and_shows_what_was_dropped(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [EVIL, EVIL, *TEXTS[:40], *TEXTS[:7], "x" * 1_000_001, ""])
    second = write_jsonl(tmp_path / "b.jsonl", [*TEXTS[40:], 7])
    data = prepared(
        tmp_path,
        [{"type": "jsonl", "paths": [str(path)]} for path in (first, second)],
        clean={"max_megabytes": 1},
        duplicates={},
        bad_rows="quarantine",
        executor={"workers": 1},
    )
    page = json.loads((data.folder / JSON_NAME).read_text())
    assert page["splits"] == shares(data)["splits"]
    assert page["documents"] == 61
    assert page["tokens"] == sum(data.num_tokens(split) for split in data.manifest.splits)
    for split in page["splits"].values():
        assert sum(split["documents shorter than"].values()) == split["documents"]
    assert abs(sum(source["share of the bytes kept"] for source in page["sources"]) - 1) < 1e-5
    dropped = {drop["reason"]: drop for drop in page["dropped"]}
    assert {reason: drop["documents"] for reason, drop in dropped.items()} == {
        "exact duplicate": 8,
        "empty": 1,
        "longer than clean.max_megabytes": 1,
        "not a string": 1,
    }
    assert page["duplicates"] == {"exact duplicate": 8}
    assert dropped["exact duplicate"]["examples"] == [EVIL, *TEXTS[:2]]
    assert dropped["longer than clean.max_megabytes"]["examples"] == ["x" * 200]
    assert dropped["not a string"]["examples"] == ['{"text": 7, "n": 1}']
    text = _read(data)
    assert EVIL in text
    assert TEXTS[0] in text
    assert "8 documents, 11.11 % of those read" in text


def test_a_report_of_one_piece_and_of_nothing_dropped(tmp_path: Path) -> None:
    data = prepared(tmp_path, [{"type": "jsonl", "paths": [str(write_jsonl(tmp_path / "<b>.jsonl"))]}])
    page = json.loads((data.folder / JSON_NAME).read_text())
    assert (page["documents"], page["dropped"], page["duplicates"]) == (60, [], {})
    text = _read(data)
    assert "Nothing was." in text
    assert f"jsonl {tmp_path}/<b>.jsonl" in text
