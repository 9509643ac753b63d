"""Progress: a bar on a terminal, lines elsewhere, and always the same items."""

import io
import logging
import sys
from pathlib import Path

import pytest

from data_prep import progress
from tests.unit.corpus import page, run, write_jsonl
from tests.unit.failing import units


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_stage_tells_its_parts_where_there_is_no_terminal(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    recipe = page(tmp_path, [{"type": "jsonl", "paths": [str(path)]}], duplicates={}, executor={"workers": 1})
    said = run(tmp_path, recipe).stderr
    for stage in ("text", "marks", "verdicts", "tokenizer", "encode"):
        assert f"{stage}: 1 of 1 parts done" in said


def test_lines_come_at_the_end_and_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work = units(tmp_path, "well", 5)
    with caplog.at_level(logging.INFO):
        assert list(progress.parts(iter(work), 5, "encode")) == work
        assert [record.message for record in caplog.records] == ["encode: 5 of 5 parts done"]
        monkeypatch.setattr(progress, "_SECONDS_BETWEEN_SENTENCES", -1.0)
        list(progress.parts(iter(work), 5, "encode"))
    assert [record.message for record in caplog.records][1:] == [
        f"encode: {n} of 5 parts done" for n in (1, 2, 3, 4, 5)
    ]


def test_a_terminal_has_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    work = units(tmp_path, "well", 5)
    assert list(progress.parts(iter(work), 5, "encode")) == work
    assert "encode" in terminal.getvalue()
    assert "5/5" in terminal.getvalue()
