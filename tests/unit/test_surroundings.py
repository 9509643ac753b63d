"""What an attempt runs in: written down without secrets, and what changed between two is named."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import machine, surroundings
from launch.folder import Attempt, LaunchFolder, Plan
from launch.look import story

ENVIRONMENT = {
    "NCCL_DEBUG": "INFO",
    "UCX_TLS": "rc",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "LOADEDMODULES": "gcc/12:cuda/12.8",
    "HF_TOKEN": "hf_abc",
    "NCCL_SECRET_KEY": "abc",
    "AWS_SECRET_ACCESS_KEY": "abc",
    "EDITOR": "vi",
    "SLURM_JOB_ID": "7",
}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan("local", str(tmp_path / "run"), str(tmp_path), sys.executable, 1, 2)


def _attempt(number: int) -> Attempt:
    return Attempt(number, "t", ("n1",), 100.0, 10, None, 130.0, "failed")


def test_what_an_attempt_runs_in_is_captured_and_no_secret_with_it(plan: Plan) -> None:
    page = surroundings.capture(plan, _attempt(1), ENVIRONMENT)
    assert page["packages"]["torch"] == machine.versions()["torch"]
    assert page["modules"] == ["gcc/12", "cuda/12.8"]
    assert set(page["variables"]) == {"NCCL_DEBUG", "UCX_TLS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"}
    assert "abc" not in json.dumps(page)


def test_a_commit_says_when_files_differ_from_it(tmp_path: Path) -> None:
    assert machine.commit(tmp_path) is None
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    clean = machine.commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "file").write_text("a")
    subprocess.run(["git", "-C", str(tmp_path), "add", "file"], check=True)
    assert machine.commit(tmp_path) == f"{clean}-dirty"


def test_explain_names_what_changed_since_the_attempt_before(plan: Plan, tmp_path: Path) -> None:
    folder = LaunchFolder(tmp_path)
    for number in (1, 2, 3):
        folder.attempt_folder(number).mkdir(parents=True)
        folder.write_attempt(_attempt(number))
        surroundings.record(folder, plan, _attempt(number), {**ENVIRONMENT, "SLURM_JOB_ID": str(number)})
    page = copy.deepcopy(dict(surroundings.of(folder, 2) or {}))
    torch = page["packages"]["torch"]
    page["packages"]["torch"] = "9.9"
    page["variables"]["NCCL_DEBUG"] = "WARN"
    page["modules"] = []
    (folder.attempt_folder(2) / "environment.json").write_text(json.dumps(page))
    (folder.attempt_folder(3) / "environment.json").write_text(json.dumps(page))
    changes = [line for line in story(folder) if "since" in line]
    assert changes == [
        f"    since attempt 1: torch {torch} -> 9.9; modules: gcc/12 cuda/12.8 -> none; NCCL_DEBUG INFO -> WARN"
    ]


def test_gpus_are_read_as_nvidia_smi_says_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB, 0, Not Active, Not Active'\n"
        "echo 'NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB, 2, Not Active, Active'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert [gpu["driver"] for gpu in machine.gpus()] == ["550.54.15"] * 2
    assert machine.versions()["driver"] == "550.54.15"
    assert machine.gpu_faults(machine.gpus()) == [
        "GPU 1 has 2 uncorrected memory errors since it was reset",
        "GPU 1 is slowed down because power is short",
    ]
