"""A run's folder belongs to one training at a time, and a refused command leaves it as it was."""

import hashlib
import json
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.e2e.test_launchers import BIN, Place, place  # noqa: F401  (place is a fixture)

ALONE = [sys.executable, "-m", "moe.train"]
ONE_RANK = "parallel.expert_parallel_size=1"


def _content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _refused(place: Place, run: str, *overrides: str) -> str:  # noqa: F811  (the fixture)
    process = place.start(ALONE, run, ONE_RANK, *overrides)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    return errors[errors.index("error: ") :]


def test_a_refused_resume_changes_nothing(place: Place) -> None:  # noqa: F811  (the fixture)
    place.losses(ALONE, "runs/whole", ONE_RANK, "checkpoint.every_steps=3")
    whole = place.folder / "runs/whole"

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(whole, place.folder / "runs" / name))

    state = damaged("cut") / "checkpoints/step_6/state-00000.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    (damaged("bare") / "checkpoints/step_6/manifest.json").unlink()
    records = damaged("records") / "metrics.jsonl"
    records.unlink()
    records.mkdir()
    damaged("settings")
    said = {
        "cut": ("bytes", "train.steps=8"),
        "bare": ("has no manifest.json", "train.steps=8"),
        "records": ("is a folder", "train.steps=8"),
        "settings": ("learning_rate was 0.001 and is 0.5", "train.optimizer.learning_rate=0.5"),
    }
    for name, (words, override) in said.items():
        before = _content(place.folder / "runs" / name)
        assert words in _refused(place, f"runs/{name}", override)
        assert _content(place.folder / "runs" / name) == before, name


def test_training_that_diverges_stops_and_spoils_no_checkpoint(place: Place) -> None:  # noqa: F811  (the fixture)
    for zero in (0, 1):
        settings = (
            "train.optimizer.learning_rate=1e30",
            f"parallel.zero_stage={zero}",
            "checkpoint.every_steps=1",
        )
        message = _refused(place, f"runs/diverged-{zero}", *settings)
        assert "not finite" in message
        assert "learning_rate" in message
        lines = (place.folder / f"runs/diverged-{zero}/metrics.jsonl").read_text().splitlines()
        *steps, last = map(json.loads, lines)
        assert all(step["loss"] < 1e9 for step in steps)
        assert last["stopped"] in message

    # The same, guarded: what can be skipped is skipped, once rolled back, and at the end it stops all the same.
    guard = ("non_finite=skip", "max_in_a_row=2", "then=roll_back", "max_roll_backs=1")
    settings = ("train.optimizer.learning_rate=1e30", "train.steps=20", "checkpoint.every_steps=1")
    process = place.start(
        ALONE, "runs/guarded", ONE_RANK, *settings, *(f"train.guard.{key}" for key in guard)
    )
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert said.count("is skipped: its ") == 4
    assert "rolled back to checkpoint step_1 (roll-back 1)" in said
    assert "as often as train.guard.max_roll_backs, 1, allows" in said[said.index("error: ") :]


def test_one_folder_has_one_writer_and_orphans_end_by_themselves(place: Place) -> None:  # noqa: F811  (the fixture)
    command = [BIN / "turnout", "train", "--nproc", "2"]
    process = place.start(command, "runs/mine", "train.steps=100000")
    deadline = time.monotonic() + 120
    while len(place.records("runs/mine")) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "runs/mine is in use: process" in _refused(place, "runs/mine", "train.steps=100000")
    process.send_signal(signal.SIGKILL)  # nothing in our command can run any more
    process.communicate(timeout=120)
    deadline = time.monotonic() + 120
    while place.survivors():
        assert time.monotonic() < deadline, "ranks outlived the command"
        time.sleep(0.2)
    assert list((place.folder / "runs/mine/checkpoints").glob("step_*/manifest.json")), "they saved first"
