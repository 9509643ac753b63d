"""Exit code 0 of a launch means that the run is done, whatever the ranks return."""

import sys
from pathlib import Path

import pytest

from launch.folder import LaunchFolder, Plan
from launch.supervise import EXIT_FAILED, supervise
from moe.errors import EXIT_STOPPED


@pytest.mark.parametrize(
    ("code", "outcomes", "returned"),
    [
        (0, ["failed"] * 3, EXIT_FAILED),
        (1, ["failed"] * 3, EXIT_FAILED),
        (EXIT_STOPPED, ["saved"], EXIT_STOPPED),
    ],
)
def test_ranks_that_leave_no_done_record_have_not_succeeded_whatever_they_return(
    code: int, outcomes: list[str], returned: int, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *moe.train*) exit {code};; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    folder = LaunchFolder(tmp_path / "run")
    folder.home.mkdir(parents=True)
    folder.recipe.write_text("name: none\n")
    folder.write_plan(Plan("local", str(folder.run), str(Path.cwd()), str(python), 1, 2))
    assert supervise(folder.run) == returned
    assert [attempt.outcome for attempt in folder.attempts()] == outcomes
