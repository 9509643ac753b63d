"""The house keeps its own rules: floors, light imports, small files, nothing of any one machine."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("moe", "data_prep", "launch")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LONGEST = 300


def test_imports_point_down_the_floors() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports())",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["moe", "moe.config", "moe.recipe", "moe.cli", "launch", "data_prep"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    program = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert {"torch", "deepspeed", "transformers"} & set(done.stdout.split()) == set()


def test_every_package_is_in_the_layer_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    named = set(re.findall(r"[\w.]+", " ".join(contract["layers"])))
    top = {
        path.stem
        for path in (ROOT / "moe").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert {f"moe.{name}" for name in top - {"__init__"}} - named == set()


@pytest.mark.slow  # collecting imports everything
def test_no_test_file_is_passed_over() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", ""],
        cwd=ROOT,
        env={**os.environ, "PYTEST_ADDOPTS": ""},  # which may ask for other lines
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")} - collected == set()


def test_files_stay_small() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    del lines["moe/hf/families.py"]  # one table, a row for each architecture
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}


def test_every_module_says_first_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT)) for path in SOURCES if not path.read_text().startswith(('"""', 'r"""'))
    ]
    assert silent == []


def test_nothing_belongs_to_one_machine() -> None:
    private = re.compile(r"/(work|home|root|Users)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in _tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if private.search(line)
    ]
    assert found == []


def test_the_lock_pins_everything_that_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = {_canonical(line.partition("==")[0]) for line in lock if "==" in line}
    assert {_canonical(re.split(r"[<>=!~ ]", line)[0]) for line in asked} - pinned == set()
    assert [line for line in lock if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line)] == []


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _tracked() -> list[Path]:
    """What is, or would be, in the repository; this file aside."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return SOURCES
    command = [git, "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in listed if (ROOT / name).is_file()]
