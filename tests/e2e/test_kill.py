"""Steps straight equal as many with a kill -9 among them, to the bit: two processes, EP 2, real launcher, real text."""

import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from moe.checkpoint import folder as folders
from moe.checkpoint.read import SavedModel
from tests.e2e.test_launchers import BIN, Place, place  # noqa: F401  (place is a fixture)

COMMAND = [BIN / "turnout", "train", "--nproc", "2"]
# The learning rate depends on the step, but not on the last one: what a longer run has begun, a shorter one may end.
SETTINGS = ("checkpoint.every_steps=10", "train.schedule.kind=constant", "train.schedule.warmup_steps=20")


def _state(run: Path, step: int) -> dict[str, torch.Tensor]:
    saved = SavedModel.open(run, step)
    files = [saved.folder / name for name in saved.manifest.files if name.startswith("state")]
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


@pytest.mark.slow
def test_killed_and_resumed_equals_straight_to_the_bit(place: Place) -> None:  # noqa: F811  (the fixture)
    cut = place.folder / "runs/cut"
    process = place.start(
        COMMAND, "runs/cut", "train.steps=100000", *SETTINGS
    )  # surely killed before its end
    deadline = time.monotonic() + 240
    while not folders.steps(cut):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for rank in place.survivors():
        with suppress(psutil.Error):  # the launcher may have ended it since
            if "moe.train" in rank.cmdline():
                rank.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert not (cut / "done").exists()
    assert place.survivors() == []

    steps = folders.steps(cut)[-1] + 10
    settings = (f"train.steps={steps}", *SETTINGS)
    resumed = place.losses(COMMAND, "runs/cut", *settings)
    straight = place.losses(COMMAND, "runs/straight", *settings)
    assert len(straight) == steps
    assert resumed == straight
    assert [record["step"] for record in place.records("runs/cut")] == list(range(1, steps + 1))
    one, other = _state(place.folder / "runs/straight", steps), _state(cut, steps)
    assert one.keys() == other.keys()
    assert not [key for key in one if not torch.equal(one[key], other[key])]


def test_tensorboard_events_are_written_by_option(place: Place) -> None:  # noqa: F811  (the fixture)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = ("train.steps=3", "parallel.expert_parallel_size=1", "logging.tensorboard=true")
    losses = place.losses([sys.executable, "-m", "moe.train"], "runs/board", *settings)
    (events,) = (place.folder / "runs/board/logs/tensorboard").rglob("events.*")
    board = EventAccumulator(str(events.parent))
    board.Reload()
    assert [scalar.value for scalar in board.Scalars("loss")] == pytest.approx(losses, rel=1e-6)
