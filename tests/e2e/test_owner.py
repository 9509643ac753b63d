"""An attempt that was given up, but lives, writes nothing into its run's folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from moe.attempt import OWNER
from tests.cluster.conftest import DATA, RECIPE

pytestmark = pytest.mark.slow


def test_an_attempt_that_was_replaced_while_it_was_away_changes_no_byte(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(DATA))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    prepare = [sys.executable, "-m", "moe.cli", "prepare", "data.yaml"]
    subprocess.run(prepare, cwd=tmp_path, env=env, check=True, capture_output=True)
    run = tmp_path / "run"
    (run / "launch").mkdir(parents=True)
    (run / "launch/owner").write_text("1 abc\n")
    overrides = [
        "run_dir=run",
        "parallel.expert_parallel_size=1",
        "train.steps=100000",
        "checkpoint.every_steps=5",
    ]
    rank = subprocess.Popen(
        [sys.executable, "-m", "moe.train", "recipe.yaml", *overrides],
        cwd=tmp_path,
        env=env | {OWNER: "1 abc"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 200
        while not (run / "checkpoints/step_5").exists():
            assert rank.poll() is None, rank.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.05)
        _halt(rank, run)
        (run / "launch/owner").write_text("2 def\n")
        before = _content(run)
        rank.send_signal(signal.SIGCONT)
        said = rank.communicate(timeout=120)[1]
    finally:
        rank.kill()
    assert rank.returncode == 2
    assert "belongs to attempt 2 by now, this is attempt 1" in said
    assert _content(run) == before


def _halt(rank: "subprocess.Popen[str]", run: Path) -> None:
    """While it is not in the middle of a save, which it was allowed to begin."""
    while True:
        rank.send_signal(signal.SIGSTOP)
        os.waitpid(rank.pid, os.WUNTRACED)  # until all of its threads stand
        if not list((run / "checkpoints").glob(".torn-*")):
            return
        rank.send_signal(signal.SIGCONT)
        time.sleep(0.02)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
