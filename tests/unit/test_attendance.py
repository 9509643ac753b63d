"""Who is named when an attempt fails, whichever agent speaks first."""

import os
import sys
import time
from pathlib import Path

import pytest

from launch.attend import Attendance
from launch.folder import Attempt, LaunchFolder, Plan

_AGENTS = """
import sys, time
from pathlib import Path
from launch.folder import LaunchFolder, NodeReport, RankReport

folder = LaunchFolder(Path(sys.argv[1]))

def says(node, count, rank, code, ended, killed=False):
    report = RankReport(rank=rank, pid=1, step=3, beats=4, code=code, killed=killed)
    folder.write_report(1, NodeReport(node, f"n{node + 1}", count, (report,), None, ended))

says(1, 1, 1, None, False)
says(0, 1, 0, 1, False)
while (folder.attempt_folder(1) / "order").exists() is False:
    time.sleep(0.02)
says(0, 2, 0, 1, True)
says(1, 2, 1, -9, True, killed=sys.argv[2] == "killed")
"""
"""The first node tells of a rank that lost its peer before the second tells of that peer's end."""


@pytest.mark.parametrize(
    ("how", "named"),
    [("died", (1, "n2", "ended by SIGKILL")), ("killed", (0, "n1", "ended with code 1"))],
)
def test_a_rank_that_died_is_named_even_if_its_peer_complains_first_and_one_that_its_agent_ended_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, named: tuple[int, str, str]
) -> None:
    folder = LaunchFolder(tmp_path / "run")
    plan = Plan("slurm", str(folder.run), str(tmp_path), sys.executable, 2, 1)
    attempt = Attempt(number=1, token="t", nodes=("n1", "n2"), began=time.time(), from_step=0)
    folder.logs(1).mkdir(parents=True)
    folder.attempt_folder(1).mkdir(parents=True)
    folder.write_attempt(attempt)
    (tmp_path / "agents.py").write_text(_AGENTS)
    srun = tmp_path / "srun"
    srun.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/agents.py {folder.run} {how}\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    ended = Attendance(folder, plan, attempt, lambda: None).attend()
    assert ended.outcome == "failed"
    assert (ended.rank, ended.host, ended.cause) == named
