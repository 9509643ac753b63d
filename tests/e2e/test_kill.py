"""20 steps straight equal 10, a kill -9 and 10 more, to the bit: two processes, EP 2, real launcher, real text."""

import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe.checkpoint.read import SavedModel
from tests.e2e.test_launchers import BIN, Place, place  # noqa: F401  (place is a fixture)

STEPS = 20
COMMAND = [BIN / "turnout", "train", "--nproc", "2"]
SETTINGS = ("train.steps=20", "checkpoint.every_steps=10")


def _state(run: Path) -> dict[str, torch.Tensor]:
    saved = SavedModel.open(run, STEPS)
    files = [saved.folder / name for name in saved.manifest.files if name.startswith("state")]
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_and_resumed_equals_straight_to_the_bit(place: Place) -> None:  # noqa: F811  (the fixture)
    straight = place.losses(COMMAND, "runs/straight", *SETTINGS)

    process = place.start(COMMAND, "runs/cut", *SETTINGS)
    reached = place.folder / "runs/cut/checkpoints/step_10/manifest.json"
    deadline = time.monotonic() + 120
    while not reached.is_file():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for rank in place.survivors():
        if "moe.train" in rank.cmdline():
            rank.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert not (place.folder / "runs/cut/done").exists()
    assert place.survivors() == []

    resumed = place.losses(COMMAND, "runs/cut", *SETTINGS)
    assert len(straight) == STEPS
    assert resumed == straight
    assert [record["step"] for record in place.records("runs/cut")] == list(range(1, STEPS + 1))
    one, other = _state(place.folder / "runs/straight"), _state(place.folder / "runs/cut")
    assert one.keys() == other.keys()
    assert not [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.timeout(200)
def test_tensorboard_events_are_written_by_option(place: Place) -> None:  # noqa: F811  (the fixture)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = ("train.steps=3", "parallel.expert_parallel_size=1", "logging.tensorboard=true")
    losses = place.losses([sys.executable, "-m", "moe.train"], "runs/board", *settings)
    (events,) = (place.folder / "runs/board/logs/tensorboard").rglob("events.*")
    board = EventAccumulator(str(events.parent))
    board.Reload()
    assert [scalar.value for scalar in board.Scalars("loss")] == pytest.approx(losses, rel=1e-6)
