"""Every way in which a part can fail ends the whole, is named, and leaves nothing half done."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep import executors, records
from data_prep.records import Unit
from data_prep.treatment import Executor, LocalExecutor
from moe.errors import TurnoutError
from tests.unit.failing import BAD, units

ENDS = {
    "killed": "killed",
    "refused": "cannot be read",
    "raises": "ValueError: a fault of ours",
    "disk full": "No space left",
    "says it is done": "SystemExit",
    "exits 0": "killed",
    "hangs": "part_minutes",
}


def ends(folder: Path, how: str, config: Executor) -> str:
    """What is said; within 60 s, of the right unit, of which nothing is left."""
    work = units(folder, how)
    began = time.monotonic()
    with executors.workers(config) as at_work, pytest.raises(TurnoutError, match=f"0000{BAD}") as said:
        executors.run(work, at_work)
    assert time.monotonic() - began < 60
    assert records.finished(work[BAD]) is None
    assert not list((folder / "stage").glob(f"*0000{BAD}*"))
    first = next(unit for unit in work if records.finished(unit) is None)  # others may have been ended too
    with pytest.raises(TurnoutError, match=f"{first} first"):
        records.gate(work)
    return str(said.value)


@pytest.mark.parametrize(
    "how",
    [how if how == "killed" else pytest.param(how, marks=pytest.mark.slow) for how in ENDS],
)
def test_a_part_that_ends_badly_in_a_process_ends_the_stage_and_is_named(tmp_path: Path, how: str) -> None:
    limit = 0.03 if how == "hangs" else None
    assert ENDS[how] in ends(tmp_path, how, LocalExecutor(type="local", workers=2, part_minutes=limit))


@pytest.mark.parametrize("how", ["refused", "raises", "disk full", "says it is done"])
def test_a_part_that_ends_badly_in_this_process_is_named(tmp_path: Path, how: str) -> None:
    assert ENDS[how] in ends(tmp_path, how, LocalExecutor(type="local", workers=1))


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_with_its_stack_also_where_one_process_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = ends(tmp_path, "hangs", LocalExecutor(type="local", workers=1, part_minutes=0.03))
    assert "took longer than executor.part_minutes" in said
    assert "failing.py" in caplog.text


@dataclass(frozen=True)
class _Liar:
    """Says of every part that it went well, and does none, or half: datatrove's Ray executor was seen to."""

    does: int

    def do(self, units: Sequence[Unit]) -> Iterator[Unit]:
        for number, unit in enumerate(units):
            if number < self.does:
                records.do(unit)
            yield unit

    def plan(self, units: Sequence[Unit]) -> str:
        return ""


@pytest.mark.parametrize("does", [0, 4])
def test_a_worker_is_judged_by_what_it_leaves_and_not_by_what_it_says(tmp_path: Path, does: int) -> None:
    with pytest.raises(TurnoutError, match=f"stage 0000{does}: .* left no record"):
        executors.run(units(tmp_path, "well"), _Liar(does))


def test_a_record_of_another_text_is_no_record(tmp_path: Path) -> None:
    (unit,) = units(tmp_path, "well", count=1)
    records.do(unit)
    changed = Unit(unit.stage, unit.name, "another key", unit.work)
    assert records.recorded(unit)
    assert records.recorded(changed) is None
    with executors.workers(LocalExecutor(type="local", workers=1)) as at_work:
        assert executors.run([changed], at_work) == 1
