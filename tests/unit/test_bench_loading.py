"""The comparison of loaders, in small: every way reads, and every figure is there."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe.bench import opening
from moe.bench.loading import compare
from moe.data.loader import Batch
from moe.errors import DataError


def test_every_way_of_reading_is_timed(tmp_path: Path) -> None:
    report = compare(tmp_path, length=256, tokens=200_000, rows=16, rounds=2)
    assert len(report.lines) == 7
    assert report.lines[0].ratio == 1
    assert all(0 < line.low <= line.microseconds <= line.high for line in report.lines)
    assert report.padding < 0.2
    assert 0 < report.cut_end_to_end < 1
    assert len(report.openings) == 12
    assert all(0 < line.far <= line.slowest and line.begin > 0 for line in report.openings)
    assert not list(tmp_path.glob("*/.packing"))


@dataclass(frozen=True)
class Forgetful(opening.Way):
    """It begins at the step before."""

    def batches(self, length: int, rank: int, world_size: int, step: int) -> Iterator[tuple[Batch, ...]]:
        return super().batches(length, rank, world_size, step - (step == opening.FAR))


def test_a_batch_that_is_not_that_of_its_step_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(tmp_path, length=256, tokens=1_000_000, rows=8, rounds=1)
    folders = (tmp_path / "ours", tmp_path / "other")
    monkeypatch.setattr(
        opening, "ways", lambda found: {"late": Forgetful(found[:1], "concatenate", apart=True)}
    )
    with pytest.raises(DataError, match="late: rank 0 of 1 opened at step 1000000 does not get"):
        opening.openings(folders, length=256, rounds=1)
