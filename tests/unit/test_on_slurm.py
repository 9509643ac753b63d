"""Arrays of Slurm, whose commands are played here: one array whatever the count, and judgement by the records."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data_prep import executors, on_slurm, records, task
from data_prep.treatment import SlurmExecutor
from moe import slurm
from moe.errors import DataError, LaunchError, TurnoutError
from tests.unit.corpus import page, run, write_jsonl
from tests.unit.failing import BAD, units

_CONFIG = "MaxArraySize            = 4\n"


@dataclass
class FakeSlurm:
    """Does the tasks of an array as it is submitted; `states` is what it says of them from then on."""

    states: Callable[[int], str] = lambda task: "COMPLETED"
    skipped: tuple[int, ...] = ()
    silent: int = 0
    """So many questions stay without an answer."""
    asked: list[tuple[str, ...]] = field(default_factory=list)
    tasks: int = 0

    def __call__(self, *command: str) -> str:
        self.asked.append(command)
        match command:
            case ("scontrol", "show", "config"):
                return _CONFIG
            case ("sbatch", "--parsable", path):
                return self._submit(Path(path))
            case ("squeue", *_):
                if self.silent:
                    self.silent -= 1
                    raise LaunchError("slurmctld does not answer.")
                return "".join(f"{n}|{self.states(n)}|None|n1\n" for n in range(self.tasks))
            case ("scancel", job):
                self.states = lambda task: "CANCELLED"
                return job
        raise AssertionError(command)

    def _submit(self, script: Path) -> str:
        (line,) = (line for line in script.read_text().splitlines() if line.startswith("#SBATCH --array=0-"))
        self.tasks = int(line.rpartition("-")[2]) + 1
        for number in range(self.tasks):
            if number not in self.skipped:
                try:
                    task.main(script.parent, number)
                except TurnoutError as error:
                    (script.parent / f"{number}.log").write_text(f"error: {error}\n")
        return "7"

    def count(self, command: str) -> int:
        return sum(words[0] == command for words in self.asked)


def _play(monkeypatch: pytest.MonkeyPatch, fake: FakeSlurm) -> FakeSlurm:
    monkeypatch.setattr(slurm, "ask", fake)
    monkeypatch.setattr(on_slurm, "_SECONDS", 0.01)
    for patience in ("_DOUBT_SECONDS", "_NEVER_SECONDS"):
        monkeypatch.setattr(on_slurm, patience, 0.2)
    return fake


def _run(folder: Path, how: str, count: int) -> int:
    with executors.workers(SlurmExecutor(type="slurm")) as at_work:
        return executors.run(units(folder, how, count), at_work)


def test_more_parts_than_an_array_may_have_are_one_array_and_each_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = _play(monkeypatch, FakeSlurm())
    assert _run(tmp_path, "well", 11) == 11
    assert len(records.gate(units(tmp_path, "well", 11))) == 11
    assert (fake.count("sbatch"), fake.tasks) == (1, 4)
    assert _run(tmp_path, "well", 11) == 0
    assert fake.count("sbatch") == 1


@pytest.mark.parametrize(
    "state", ["FAILED", "COMPLETED", pytest.param("OUT_OF_MEMORY", marks=pytest.mark.slow)]
)
def test_a_part_that_fails_among_more_than_an_array_may_have_stops_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """datatrove was seen to begin the next stage, and to call it complete."""
    fake = _play(monkeypatch, FakeSlurm(lambda number: state if number == BAD else "RUNNING"))
    with pytest.raises(DataError, match=f"stage 0000{BAD}: task 7_{BAD} .*{BAD}.log ends with: .* be read"):
        _run(tmp_path, "refused", 11)
    assert fake.asked[-2:][0] == ("scancel", "7")
    with pytest.raises(DataError, match=f"0000{BAD} first"):
        records.gate(units(tmp_path, "refused", 11))


def test_a_task_that_never_wrote_anything_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _play(monkeypatch, FakeSlurm(skipped=(1,)))
    with pytest.raises(DataError, match=r"stage 00001: .* has ended, but left no record .*1\.log is empty"):
        _run(tmp_path, "well", 3)
    _play(monkeypatch, FakeSlurm())
    assert _run(tmp_path, "well", 3) == 1


def test_a_controller_that_is_silent_for_a_while_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _play(monkeypatch, FakeSlurm(silent=3))
    assert _run(tmp_path, "well", 3) == 3
    _play(monkeypatch, FakeSlurm(silent=10**6))
    monkeypatch.setattr(on_slurm, "_SILENCE_SECONDS", 0.05)
    with pytest.raises(LaunchError, match="does not answer"):
        _run(tmp_path, "well", 4)


def test_a_dry_run_shows_the_script(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a b.jsonl")
    executor = {"type": "slurm", "account": "lab", "task_minutes": 30, "memory_gigabytes": 4, "cpus": 2}
    recipe = page(tmp_path, [{"type": "jsonl", "paths": [str(path)]}], executor=executor)
    told = run(tmp_path, recipe, "--dry-run").stdout
    lines = told.splitlines()
    for line in ("account=lab", "time=30", "mem=4G", "cpus-per-task=2", "array=0-0", "job-name=turnout-text"):
        assert f"#SBATCH --{line}" in lines
    script = tmp_path / "script"
    script.write_text(told[told.index("#!") :])
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.parametrize(
    ("executor", "words"),
    [
        ("{type: slurm, partition: 'a b'}", "executor.partition is 'a b'"),
        ("{type: slurm, account: '--uid=0'}", "executor.account is '--uid=0'"),
        ('{type: slurm, partition: "a\\nb"}', "executor.partition"),
        ("{type: slurm, cpus: 0}", "executor.cpus is 0"),
        ("{type: slurm, adress: x}", "executor.adress: there is no such setting"),
        ("{type: ray, address: auto, workers: 2}", "workers 2 has no effect on a running cluster"),
        ("{type: pbs}", "executor is {'type': 'pbs'}"),
    ],
)
def test_an_executor_that_cannot_be_is_refused(tmp_path: Path, executor: str, words: str) -> None:
    recipe = page(tmp_path, [{"type": "stdlib"}])
    result = run(tmp_path, recipe, f"executor={executor}")
    assert result.exit_code == 2
    assert words in result.stderr


def test_the_executor_of_the_command_line_takes_the_place_of_the_recipes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    executor = {"type": "slurm", "partition": "big"}
    recipe = page(tmp_path, [{"type": "jsonl", "paths": [str(path)]}], executor=executor)
    told = run(tmp_path, recipe, "--executor", "local", "--dry-run").stdout
    assert told == "text: 1 parts, 0 of them done; then tokenizer, encode\n"
    assert "--partition=big" in run(tmp_path, recipe, "--executor", "slurm", "--dry-run").stdout


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="this machine has no Slurm commands"):
        _run(tmp_path, "well", 3)
