"""`turnout certify` as a user meets it: a table, a certificate, an exit code; and the certificate in checkpoints."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moe import train
from moe.certify.command import command
from moe.certify.layouts import Layout
from moe.certify.parts import Deviation
from moe.certify.prove import Proof, Trial
from moe.certify.shrink import shrink
from moe.checkpoint import certificate, folder
from moe.checkpoint.save import TrainState, save
from moe.config import RunConfig
from moe.errors import ConfigError
from moe.recipe import load
from tests.conftest import WriteRecipe
from tests.dist.layouts import ranks_of, start, tiny
from tests.harness import run_ranks

DEMO = "configs/demo.yaml"
SMALL = ("--layouts", "ep=2,zero=1,then=resume")


def turnout(
    *arguments: str, cwd: Path | None = None, seconds: float = 280
) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "moe.cli", "certify", *arguments]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=seconds)


def test_the_demo_is_certified(tmp_path: Path) -> None:
    done = turnout(DEMO, f"run_dir={tmp_path / 'run'}", "--world", "2", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 trainings of a small demo on cpu do what one process and the rules say." in done.stdout
    page = json.loads((tmp_path / "run/certificate.json").read_text())
    assert (page["format"], page["version"], page["verdict"]) == ("turnout-certificate", 1, "pass")
    assert page["recipe"]["model"]["hidden_size"] == 192
    assert page["small_recipe"]["model"]["hidden_size"] == 32
    assert set(page["versions"]) == {"turnout", "torch", "deepspeed", "python"}
    layout = page["trials"][1]["layout"]
    assert {key: layout[key] for key in ("world", "ep", "zero", "then")} == {
        "world": 2,
        "ep": 2,
        "zero": 1,
        "then": "resume",
    }
    checks = {check["check"]: check for check in page["trials"][1]["checks"]}
    assert checks["gradient of experts"]["passed"]
    assert 0 < checks["gradient of experts"]["deviation"] < checks["gradient of experts"]["bound"]
    assert checks["exp_avg after resume"]["deviation"] == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["certificate.json"]
    run = load(RunConfig, DEMO, [f"run_dir={tmp_path / 'run'}", "parallel.zero_stage=2"])
    assert certificate.find(run, run.folder) == page
    assert certificate.sentence(page).startswith("2 of 2 trainings of a small copy, in as many layouts")
    other = load(RunConfig, DEMO, [f"run_dir={tmp_path / 'run'}", "model.moe.top_k=3"])
    assert certificate.find(other, run.folder) is None


@pytest.mark.timeout(1500)
@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("recipe", [DEMO, "configs/study/dense.yaml", "configs/study/sparse.yaml"])
def test_every_shipped_recipe_is_certified_in_the_whole_selection(recipe: str, tmp_path: Path) -> None:
    done = turnout(recipe, "--world", "4", "--json", str(tmp_path / "certificate.json"), seconds=1400)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no.yaml",), "no.yaml: the recipe cannot be read"),
        ((DEMO, "model.moe.topk=2"), "did you mean model.moe.top_k?"),
        ((DEMO, "--layouts", "ep=3"), "the recipe allows none of them"),
        ((DEMO, "--layouts", "zero=7"), "zero is '7': it must be one of"),
        ((DEMO, "--json", "configs"), "is a directory"),
        ((DEMO, "--json", f"{DEMO}/certificate.json"), "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said_with_exit_code_2(arguments: tuple[str, ...], words: str) -> None:
    done = turnout(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    done = turnout(DEMO, f"run_dir={tmp_path / 'run'}", "--layouts", "ep=3")
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_printed_written_and_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults themselves are planted in tests/dist/test_certify.py."""
    run = load(RunConfig, DEMO)
    bad = Deviation("gradient of experts", 1.0, 2e-4, 0, "/layers.0.ffn.experts.down[1]", "2 times")
    missing = Deviation("exp_avg after resume", math.inf, 0.0, 2, "exp_avg/head.weight")
    good = Deviation("loss", 1e-7, 1e-5, 1)
    trials = (Trial(Layout(), (good,)), Trial(Layout(2, 2), (bad, missing, good)))
    left_out = ((Layout(2, zero=0), "a rule"),)
    proof = Proof(run, shrink(run, 2), "cpu", trials, left_out)
    monkeypatch.setattr("moe.certify.prove.certify", lambda *_: proof)
    target = tmp_path / "new/certificate.json"
    done = CliRunner().invoke(command, [DEMO, "--json", str(target)])
    assert done.exit_code == 1
    printed = " ".join(done.stdout.split())
    assert (
        "2 ranks, EP 2, ZeRO 1: step 1: gradient of experts is off by 1 (bound 0.0002), first in "
        "/layers.0.ffn.experts.down[1]: 2 times" in printed
    )
    assert "step 3: exp_avg after resume is not there, or not finite, first in exp_avg/head.weight" in printed
    assert "left out: 2 ranks, EP 1, ZeRO 0: a rule" in printed
    assert (
        "1 of 2 trainings of a small demo on cpu do what one process and the rules say; 1 do not." in printed
    )
    page = json.loads(target.read_text())
    assert page["verdict"] == "fail"
    assert [trial["verdict"] for trial in page["trials"]] == ["pass", "fail"]
    assert page["trials"][1]["checks"][1]["deviation"] is None
    assert [path.name for path in target.parent.iterdir()] == ["certificate.json"]


def _save_all(rank: int, folders: list[Path]) -> None:
    for run_folder in folders:
        run = tiny(run_dir=str(run_folder))
        save(start(run, ranks_of(rank, 1, 1)), TrainState(0, 0), "data")


def test_a_certificate_that_fits_the_recipe_goes_into_checkpoints(tmp_path: Path) -> None:
    names = {"fitting": certificate.recipe_hash(tiny()), "another": "0" * 64, "none": ""}
    for name, found in names.items():
        (tmp_path / name).mkdir()
        if found:
            page = {"format": "turnout-certificate", "version": 1, "recipe_sha256": found}
            (tmp_path / name / "certificate.json").write_text(json.dumps(page))
    run_ranks(_save_all, 1, tmp_path, [tmp_path / name for name in names])
    listed = {}
    for name in names:
        step = tmp_path / name / "checkpoints/step_0"
        manifest = folder.read_manifest(step)
        folder.verify(step, manifest)
        listed[name] = "certificate.json" in manifest.files
    assert listed == {"fitting": True, "another": False, "none": False}


class _Data:
    vocab_size, fingerprint, is_chat = 512, "data", False

    def num_tokens(self, split: str) -> int:
        return 10_000

    def longest_conversation(self) -> int | None:
        return None


def test_a_run_folder_with_a_certificate_alone_can_be_trained_in(
    tiny_page: dict[str, Any], write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.TokenData, "open", lambda *_, **__: _Data())
    (tmp_path / "run").mkdir()
    (tmp_path / "run/certificate.json").write_text("{}")
    run = load(RunConfig, write_recipe({**tiny_page, "run_dir": str(tmp_path / "run")}))
    assert isinstance(train.preflight(run, 1), _Data)
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other things than a run"):
        train.preflight(run, 1)
