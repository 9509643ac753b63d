"""Fake launchers of a few lines, real processes and real signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

RANK = """
import signal, sys, time
from pathlib import Path
if "deaf" not in sys.argv:
    time.sleep(0.5)  # as an import of torch: a signal before the handler would be the end
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
Path(sys.argv[1]).write_text("up")
time.sleep(600)
"""

LAUNCHER = """
import subprocess, sys, time
from pathlib import Path
ranks = [subprocess.Popen([sys.executable, "-u", {rank!r}, {up!r} + str(n), *sys.argv[1:]]) for n in range(2)]
if "fail" in sys.argv:
    while not Path({up!r} + "all").exists():
        time.sleep(0.05)
    sys.exit(3)
codes = [rank.wait() for rank in ranks]
sys.exit(max(codes) if codes[0] == codes[1] else 1)
"""

OURS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # as on a terminal, however the tests were started
from launch import ranks
is_rank = lambda line: list(line[1:3]) == ["-u", {rank!r}]
told = lambda: print("told", flush=True)
outcome = ranks.run([sys.executable, {launcher!r}, *sys.argv[1:]], os.environ, is_rank, told)
print(f"code {{outcome.code}} stops {{outcome.stops}}", flush=True)
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    rank, launcher, ours = tmp_path / "rank.py", tmp_path / "launcher.py", tmp_path / "ours.py"
    rank.write_text(RANK)
    launcher.write_text(LAUNCHER.format(rank=str(rank), up=str(tmp_path / "up")))
    ours.write_text(OURS.format(rank=str(rank), launcher=str(launcher)))

    def begin(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ours), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))

    return begin


def _wait(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def _ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_signal_reaches_every_rank_even_before_it_has_a_handler(start: Start, tmp_path: Path) -> None:
    ours = start()
    _wait(lambda: len(_ranks_of(ours)) == 3)
    ours.send_signal(signal.SIGTERM)
    assert ours.communicate(timeout=120)[0] == "told\ncode 75 stops 1\n"


def test_ctrl_c_is_a_request_to_stop_too(start: Start, tmp_path: Path) -> None:
    ours = start()
    _wait(lambda: (tmp_path / "up0").exists() and (tmp_path / "up1").exists())
    ours.send_signal(signal.SIGINT)
    assert ours.communicate(timeout=120)[0] == "told\ncode 75 stops 1\n"


def test_a_second_signal_ends_ranks_that_do_not_listen(start: Start, tmp_path: Path) -> None:
    ours = start("deaf")
    _wait(lambda: (tmp_path / "up0").exists() and (tmp_path / "up1").exists())
    family = _ranks_of(ours)
    ours.send_signal(signal.SIGTERM)
    assert ours.stdout is not None
    assert ours.stdout.readline() == "told\n"
    ours.send_signal(signal.SIGTERM)
    assert ours.communicate(timeout=120)[0] == "code -9 stops 2\n"
    assert not [process for process in family if _alive(process)]


def test_ranks_do_not_outlive_a_launcher_that_fails(start: Start, tmp_path: Path) -> None:
    ours = start("fail")
    _wait(lambda: len(_ranks_of(ours)) == 3)
    family = _ranks_of(ours)
    (tmp_path / "upall").touch()
    assert ours.communicate(timeout=120)[0] == "code 3 stops 0\n"
    assert not [process for process in family if _alive(process)]


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
