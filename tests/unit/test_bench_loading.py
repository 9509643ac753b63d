"""The comparison of loaders, in small: every way reads, and every figure is there."""

from pathlib import Path

from moe.bench.loading import compare


def test_every_way_of_reading_is_timed(tmp_path: Path) -> None:
    report = compare(tmp_path, length=256, tokens=200_000, rows=16, rounds=2)
    assert len(report.lines) == 7
    assert report.lines[0].ratio == 1
    assert all(0 < line.low <= line.microseconds <= line.high for line in report.lines)
    assert report.padding < 0.2
    assert 0 < report.cut_end_to_end < 1
