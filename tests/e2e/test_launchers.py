"""One recipe under every launcher gives the same losses; stopping and failing leave nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launch.port import free_port

BIN = Path(sys.executable).parent
STEPS = 6
DATA = {
    "name": "tiny",
    "sources": [{"type": "text", "paths": [str(Path(json.__file__).parent / "*.py")]}],
    "tokenizer": {"type": "bpe", "vocab_size": 300},
    "validation": {"fraction": 0.2},
}
RECIPE = {
    "name": "tiny",
    "seed": 7,
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 2,
        "max_sequence_length": 64,
        "attention": {"num_heads": 4, "num_kv_heads": 2},
        "moe": {"num_experts": 8, "top_k": 2, "expert_intermediate_size": 16},
    },
    "data": {"path": "data/tiny", "sequence_length": 32},
    "train": {
        "steps": STEPS,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "precision": "fp32",
        "optimizer": {"learning_rate": 1e-3},
    },
    "parallel": {"expert_parallel_size": 2},
}


@dataclass(frozen=True)
class Place:
    """A folder with data and a recipe, in which every launch makes its own run folder."""

    folder: Path

    def start(self, command: Sequence[str | Path], run: str, *overrides: str) -> subprocess.Popen[str]:
        arguments = [*map(str, command), "recipe.yaml", f"run_dir={run}", *overrides]
        return subprocess.Popen(
            arguments,
            cwd=self.folder,
            env=_environment(),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def losses(self, command: Sequence[str | Path], run: str, *overrides: str) -> list[float]:
        """Of each step of a run to the end."""
        process = self.start(command, run, *overrides)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert (self.folder / run / "done").is_file()
        return [record["loss"] for record in self.records(run)]

    def records(self, run: str) -> list[dict[str, Any]]:
        path = self.folder / run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [record for record in map(json.loads, lines) if "loss" in record]

    def survivors(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _alive_in(process, self.folder)]

    def ranks(self) -> list[psutil.Process]:
        """Of `turnout train`. What a rank starts has its command line for a moment, and is none."""
        found = {}
        for process in self.survivors():
            with suppress(psutil.Error):
                if process.cmdline()[1:4] == ["-u", "-m", "moe.train"]:
                    found[process.pid] = (process, process.ppid())
        return [process for process, parent in found.values() if parent not in found]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("launchers")
    (folder / "data.yaml").write_text(yaml.safe_dump(DATA))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    command = [sys.executable, "-m", "moe.cli", "prepare", "data.yaml"]
    subprocess.run(command, cwd=folder, env=_environment(), check=True, capture_output=True, timeout=120)
    return Place(folder)


@pytest.fixture(scope="module")
def expected(place: Place) -> list[float]:
    """What `turnout train --nproc 2` gives, for the others to equal."""
    losses = place.losses([BIN / "turnout", "train", "--nproc", "2"], "runs/turnout")
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    return losses


def test_one_plain_process_gives_the_same_losses(place: Place, expected: list[float]) -> None:
    losses = place.losses(
        [sys.executable, "-m", "moe.train"], "runs/plain", "parallel.expert_parallel_size=1"
    )
    assert losses == pytest.approx(expected, rel=1e-5)


def test_ranks_that_share_sequences_give_the_same_losses(place: Place, expected: list[float]) -> None:
    command = [BIN / "turnout", "train", "--nproc", "2"]
    losses = place.losses(command, "runs/shared", "parallel.sequence_parallel_size=2")
    assert losses == pytest.approx(expected, rel=1e-5)


LAUNCHERS: dict[str, Callable[[int], list[str | Path]]] = {
    "deepspeed": lambda port: [
        *(BIN / "deepspeed", "--num_accelerators", "2", "--master_port", str(port)),
        *("--no_local_rank", "--module", "moe.train"),
    ],
    "torchrun": lambda port: [
        BIN / "torchrun",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(port),
        "-m",
        "moe.train",
    ],
    "accelerate": lambda port: [
        # Without --multi_gpu it starts several CPU processes by MPI alone; the name is all that it has of a GPU.
        *(BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *(
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            str(port),
            "-m",
            "moe.train",
        ),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_same_bits(launcher: str, place: Place, expected: list[float]) -> None:
    assert place.losses(LAUNCHERS[launcher](free_port("127.0.0.1")), f"runs/{launcher}") == expected


def test_stopped_by_sigterm_it_saves_and_the_same_command_goes_on(place: Place) -> None:
    command = [BIN / "turnout", "train", "--nproc", "2"]
    process = place.start(command, "runs/stopped", "train.steps=100000")
    _wait(lambda: len(place.records("runs/stopped")) > 2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert place.survivors() == []
    stopped_after = place.records("runs/stopped")[-1]["step"]
    assert not (place.folder / "runs/stopped/done").exists()

    steps = stopped_after + 5  # all of them would take too long
    place.losses(command, "runs/stopped", f"train.steps={steps}")
    assert [record["step"] for record in place.records("runs/stopped")] == list(range(1, steps + 1))


def test_a_killed_rank_ends_the_command_and_every_other_rank(place: Place) -> None:
    process = place.start([BIN / "turnout", "train", "--nproc", "2"], "runs/killed", "train.steps=100000")
    _wait(lambda: len(place.records("runs/killed")) > 2, process)
    ranks = place.ranks()
    assert len(ranks) == 2
    ranks[1].kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "runs/killed is not done" in errors
    assert place.survivors() == []


def test_what_only_the_ranks_can_see_is_still_one_message_and_exit_code_2(place: Place) -> None:
    damaged = place.folder / "data" / "damaged"
    shutil.copytree(place.folder / "data" / "tiny", damaged)
    shard = next(damaged.glob("train-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2] + b"\x01\x00")
    process = place.start(
        [BIN / "turnout", "train", "--nproc", "2"], "runs/damaged", "data.path=data/damaged"
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert errors.count("error:") == 1, errors
    assert shard.name in errors
    assert "Traceback" not in errors


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _wait(true: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)


def _alive_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder)
    except psutil.Error:
        return False
