"""Back into the queue: what Slurm is asked and when, what a person is told, and layouts for other numbers of ranks."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from launch import heir, slurm
from launch.folder import Attempt, LaunchFolder, Limits, NodeReport, Plan, RankReport, fruitless, read, write
from launch.layout import refit
from launch.look import story
from launch.notice import Notice
from launch.slurm import Job, Request, SlurmSilentError, script
from launch.supervise import Supervisor
from launch.verdict import judge
from moe.cli import turnout
from moe.errors import EXIT_STOPPED, LaunchError

FakeSlurm = Callable[[str], Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Slurm's commands as a script that gets the body; what they were asked for stands in the file it returns."""
    monkeypatch.setattr("moe.slurm._RETRY_SECONDS", 0.01)
    folder, asked = tmp_path / "bin", tmp_path / "asked"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(body: str) -> Path:
        for name in ("scontrol", "sbatch", "sinfo", "scancel"):
            path = folder / name
            path.write_text(f'#!/bin/sh\necho "{name} $*" >> {asked}\n{body}\n')
            path.chmod(0o755)
        return asked

    return make


@pytest.fixture
def folder(tmp_path: Path) -> LaunchFolder:
    """Of a run that was launched through Slurm as job 5."""
    folder = LaunchFolder(tmp_path / "run")
    folder.home.mkdir(parents=True)
    folder.write_plan(Plan("slurm", str(folder.run), str(tmp_path), "python", 2, 2))
    write(folder.home / "job.json", {"job": "5"})
    return folder


def _refusing(srun: Path, words: str) -> None:
    """An srun that starts nothing."""
    srun.write_text(f"#!/bin/sh\necho srun: error: {words} >&2\nexit 1\n")
    srun.chmod(0o755)


def _requeue(folder: LaunchFolder) -> Result:
    return CliRunner().invoke(turnout, ["requeue", str(folder.run)])


def test_slurm_is_asked_again_while_it_is_silent(fake: FakeSlurm, tmp_path: Path) -> None:
    asked = fake(
        f'[ -e {tmp_path}/up ] || {{ touch {tmp_path}/up; echo "Unable to contact slurm controller" >&2; exit 1; }}\n'
        "echo JobState=RUNNING"
    )
    assert Job("5", ("a",)).is_running()
    assert asked.read_text().splitlines() == ["scontrol --oneliner show job 5"] * 2


def test_a_silent_slurm_is_told_from_a_job_that_it_does_not_know(fake: FakeSlurm) -> None:
    fake('echo "Invalid job id specified" >&2; exit 1')
    assert slurm.state("5") is None
    fake('echo "Unable to contact slurm controller (connect failure)" >&2; exit 1')
    with pytest.raises(SlurmSilentError, match="reached no slurmctld"):
        slurm.state("5")


def test_a_requeue_outlives_the_signal_that_it_brings_about(fake: FakeSlurm) -> None:
    asked = fake("kill -TERM $$")
    Job("5", ("a", "b")).requeue()
    assert asked.read_text() == "scontrol requeue 5\n"


@pytest.mark.parametrize(("before", "after"), [("(null)", "b"), ("c,d", "b,c,d")])
def test_another_job_leaves_out_a_dead_node_and_what_was_left_out_before(
    before: str, after: str, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "8")
    asked = fake(f"case $0 in *sbatch) echo 6$SLURM_GPUS_PER_NODE;; *) echo 'ExcNodeList={before}';; esac")
    assert Job("5", ("a", "b")).submit_without("job.sbatch", ["b"]) == "6"
    assert asked.read_text().splitlines()[-1] == f"sbatch --parsable --exclude={after} job.sbatch"


def test_nodes_that_are_drained_are_told_from_others(fake: FakeSlurm) -> None:
    fake("echo a drained; echo b draining@; echo c mixed; echo d down*")
    assert Job("5", ("a", "b", "c", "d")).drained() == {"a", "b"}


@pytest.mark.parametrize(
    ("preempted", "drained", "why"),
    [
        ("None", "", None),
        ("2026-03-01T10:00:05", "", "preemption"),
        ("2026-03-01T09:00:05", "", None),  # then it was requeued
        ("None", "echo a drained; echo b draining", "drain of a, b"),
    ],
)
def test_a_job_is_asked_whether_slurm_wants_its_nodes(
    preempted: str, drained: str, why: str | None, fake: FakeSlurm
) -> None:
    page = f"JobState=RUNNING StartTime=2026-03-01T10:00:00 PreemptTime={preempted}"
    fake(f"case $0 in *scontrol) echo {page};; *sinfo) echo c mixed; {drained or ':'};; esac")
    assert Job("5", ("a", "b", "c")).notice() == why


def test_what_slurm_wants_is_noticed_beside_the_training_and_an_error_is_no_news() -> None:
    wanted, asked_again = threading.Event(), threading.Event()
    answers = iter([None, "preemption"])

    def ask() -> str | None:
        for answer in answers:
            if answer:
                assert wanted.wait(60)
            return answer
        asked_again.set()
        raise LaunchError("no answer")

    with Notice.watching(ask, seconds=0.01) as notice:
        assert notice.why is None
        wanted.set()
        assert asked_again.wait(60)
        time.sleep(0.05)
        assert notice.why == "preemption"


def test_a_running_job_is_asked_to_save_until_it_is_in_the_queue(
    fake: FakeSlurm, folder: LaunchFolder
) -> None:
    mark = folder.home / "saves"
    asked = fake(
        f"case $0 in *scancel) touch {mark};; esac\n[ -e {mark} ] && echo JobState=PENDING || echo JobState=RUNNING"
    )
    result = _requeue(folder)
    assert "job 5 is back in the queue" in result.output
    assert "scancel --signal=USR1 --batch 5" in asked.read_text()


def test_a_running_job_that_leaves_a_lost_node_is_told_by_its_new_number(
    fake: FakeSlurm, folder: LaunchFolder
) -> None:
    page = folder.home / "job.json"
    fake(
        f'case $0 in *scancel) echo \'{{"job": "6"}}\' > {page};; esac\n'
        f"grep -q 6 {page} && echo JobState=COMPLETING || echo JobState=RUNNING"
    )
    assert "is queued anew as job 6; newest checkpoint: step 0" in _requeue(folder).output


@pytest.mark.parametrize(
    ("bad", "state", "sbatch", "then"),
    [
        (set[str](), "mixed", "echo 6", "requeued"),
        ({"b"}, "mixed", "echo 6", "queued anew as job 6: without b"),
        ({"b"}, "down*", "echo 6", "requeued"),  # a requeue waits for no dead node then
        ({"b"}, "mixed", "echo too few nodes >&2; exit 1", "requeued"),
    ],
)
@pytest.mark.parametrize("outcome", ["saved", "lost"])
def test_a_planned_stop_leaves_a_node_that_died_if_slurm_has_not_noticed_yet(
    outcome: str, bad: set[str], state: str, sbatch: str, then: str, fake: FakeSlurm, folder: LaunchFolder
) -> None:
    asked = fake(
        f"case $0 in *sbatch) {sbatch};; *sinfo) echo a mixed; echo 'b {state}';; "
        "*) echo JobState=RUNNING ExcNodeList=c;; esac"
    )
    folder.attempt_folder(1).mkdir()
    attempt = Attempt(1, "t", ("a", "c"), 0.0, 0, "5", 1.0, outcome)
    supervisor = Supervisor(folder, folder.plan(), Job("5", ("a", "b", "c")), bad=bad)
    assert supervisor._leave(attempt) == EXIT_STOPPED
    assert folder.attempts()[-1].then == then
    assert ("scontrol requeue 5" in asked.read_text()) == (then == "requeued")


def test_a_job_that_has_ended_is_submitted_anew(fake: FakeSlurm, folder: LaunchFolder) -> None:
    asked = fake("case $* in *--parsable*) echo 6;; *) echo JobState=FAILED;; esac")
    folder.attempt_folder(1).mkdir()
    folder.write_attempt(Attempt(1, "t", ("a", "b"), 0.0, 0, "5", 1.0, "failed"))
    folder.stop.write_text("stop\n")
    assert "is queued anew as job 6" in _requeue(folder).output
    assert f"sbatch --parsable {folder.home}/job.sbatch" in asked.read_text()
    assert read(folder.home / "job.json") == {"job": "6"}
    assert not folder.stop.exists()
    assert folder.plan().first_attempt == 2


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("JobState=PENDING Reason=Priority", "job 5 is in the queue already"),
        ("JobState=PENDING Reason=JobHeldUser", "job 5 was held in the queue and is free"),
    ],
)
def test_a_job_in_the_queue_stays_there_and_is_held_no_more(
    said: str, told: str, fake: FakeSlurm, folder: LaunchFolder
) -> None:
    fake(f"echo {said}")
    assert told in _requeue(folder).output


def test_what_cannot_be_requeued_is_refused(fake: FakeSlurm, folder: LaunchFolder) -> None:
    fake("echo JobState=COMPLETING")
    assert "job 5 of Slurm is COMPLETING. Wait" in str(_requeue(folder).exception)
    fake("echo JobState=COMPLETED")
    folder.done.write_text('{"step": 8, "tokens": 1}\n')
    assert "is done: there is nothing to go on with" in str(_requeue(folder).exception)
    folder.write_plan(replace(folder.plan(), kind="hosts"))
    assert "where there is no queue" in str(_requeue(folder).exception)


@pytest.mark.parametrize(
    ("section", "ranks", "changes"),
    [
        ({}, 4, ()),
        ({}, 2, ("parallel.expert_parallel_size=2",)),
        ({}, 1, ("parallel.expert_parallel_size=1",)),
        ({}, 8, ("train.micro_batch_size=1",)),
        ({}, 3, None),
        ({"balance": {"capacity_factor": 1.5}}, 8, None),
    ],
)
def test_a_recipe_is_fitted_to_other_ranks_with_the_same_batch(
    section: dict[str, object],
    ranks: int,
    changes: tuple[str, ...] | None,
    tiny_page: dict[str, object],
    write_recipe: Callable[[dict[str, object]], Path],
) -> None:
    page = tiny_page | {"parallel": {"expert_parallel_size": 4}} | section
    assert refit(write_recipe(page), ranks) == changes


def test_with_fewer_nodes_as_many_are_used_as_the_recipe_fits(
    folder: LaunchFolder, tiny_page: dict[str, object], write_recipe: Callable[[dict[str, object]], Path]
) -> None:
    folder.recipe.write_text(write_recipe(tiny_page).read_text())
    plan = Plan("slurm", str(folder.run), "/", "python", 4, 1, min_nodes=1)
    supervisor = Supervisor(folder, plan, Job("5", ("a", "b", "c", "d")), bad={"b"})
    assert supervisor._nodes() == ("a", "c")  # on three the batch of 8 cannot be
    assert replace(supervisor, plan=replace(plan, min_nodes=None))._nodes() is None
    assert replace(supervisor, bad=set())._nodes() == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("state", "code", "outcome", "then"),
    [
        ("COMPLETING", EXIT_STOPPED, "left", "left to Slurm, which ends or requeues the job"),
        ("RUNNING", 1, "unstarted", "given up: 3 attempts in a row without a new checkpoint"),
    ],
)
def test_a_job_that_slurm_takes_away_is_no_attempt_that_failed(
    fake: FakeSlurm,
    folder: LaunchFolder,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    code: int,
    outcome: str,
    then: str,
) -> None:
    """Slurm starts no agent in a job that it preempts, and tells us so a while later."""
    monkeypatch.setattr("launch.supervise._PAUSE_SECONDS", 0.0)
    asked = fake(f"echo JobState={state}")
    _refusing(asked.parent / "bin/srun", "Unable to create step for job 5")
    for number in (1, 2):
        folder.attempt_folder(number).mkdir()
        failed = Attempt(number, "t", ("a", "b"), 0.0, 0, ended=1.0, outcome="failed", to_step=0)
        folder.write_attempt(failed)
    supervisor = Supervisor(folder, folder.plan(), Job("5", ("a", "b")))
    assert supervisor._run(lambda: None) == code
    last = folder.attempts()[-1]
    assert (last.number, last.outcome, last.then) == (3, outcome, then)
    assert "Unable to create step" in (last.cause or "")
    assert fruitless(folder.attempts()) == (2 if outcome == "left" else 3)


@pytest.mark.parametrize(
    ("body", "then", "code"),
    [
        ("echo 6", "queued anew as job 6: in job 5 Slurm starts no agent", EXIT_STOPPED),
        (
            "echo no such nodes >&2; exit 1",
            "given up: in job 5 Slurm starts no agent, and Slurm takes no other job: ",
            1,
        ),
    ],
)
def test_a_job_in_which_slurm_starts_no_agent_twice_is_left_for_another(
    body: str,
    then: str,
    code: int,
    fake: FakeSlurm,
    folder: LaunchFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launch.supervise._PAUSE_SECONDS", 0.0)
    asked = fake(f"case $0 in *sbatch) {body};; *) echo JobState=RUNNING ExcNodeList=c;; esac")
    _refusing(asked.parent / "bin/srun", "Invalid generic resource")
    supervisor = Supervisor(folder, folder.plan(), Job("5", ("a", "b")))
    assert supervisor._run(lambda: None) == code
    first, last = folder.attempts()
    assert (first.outcome, first.then, last.outcome) == ("unstarted", "started again", "unstarted")
    assert (last.then or "").startswith(then)
    assert (read(folder.home / "job.json") == {"job": "6"}) == (code == EXIT_STOPPED)


def test_with_too_few_nodes_a_job_that_slurm_takes_away_is_left_to_it(
    fake: FakeSlurm, folder: LaunchFolder
) -> None:
    asked = fake("echo JobState=PENDING")
    folder.attempt_folder(1).mkdir()
    folder.write_attempt(Attempt(1, "t", ("a", "b"), 0.0, 0, ended=1.0, outcome="lost", host="b"))
    supervisor = Supervisor(folder, folder.plan(), Job("5", ("a", "b")), bad={"b"})
    assert supervisor._run(lambda: None) == EXIT_STOPPED
    assert folder.attempts()[-1].then == "left to Slurm, which ends or requeues the job"
    assert "sbatch" not in asked.read_text()


def test_a_script_asks_for_as_few_nodes_as_will_do(tmp_path: Path) -> None:
    plan = Plan("slurm", str(tmp_path / "run"), "/", "python", 4, 2, min_nodes=2)
    page = script(LaunchFolder(tmp_path), plan, Request("demo", spares=1), {})
    assert "#SBATCH --nodes=2-5\n" in page
    assert "ntasks" not in page  # else Slurm takes the fewest


def test_what_was_changed_for_fewer_ranks_is_explained(folder: LaunchFolder) -> None:
    folder.attempt_folder(1).mkdir()
    attempt = Attempt(1, "t", ("a",), 0.0, 0, overrides=("parallel.expert_parallel_size=2",))
    folder.write_attempt(attempt)
    assert folder.attempts() == [attempt]
    assert "from step 0 with parallel.expert_parallel_size=2: no end" in next(story(folder))


def test_a_supervisor_is_gone_when_it_counts_no_more_and_neither_ended_nor_went_on(
    folder: LaunchFolder,
) -> None:
    home = folder.attempt_folder(1)
    home.mkdir()
    (home / "lease").write_text("7\n")
    assert heir.is_gone(folder, 1, 0.3)
    (home / "order").write_text("stop\n")
    assert heir.is_gone(folder, 1, 0.3)
    folder.attempt_folder(2).mkdir()
    assert not heir.is_gone(folder, 1, 0.3)
    (home / "order").write_text("end\n")
    assert not heir.is_gone(folder, 1, 30.0)


def test_one_agent_alone_queues_a_run_anew_whose_supervisor_is_gone(
    fake: FakeSlurm, folder: LaunchFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "b")
    folder.attempt_folder(1).mkdir()
    fake("echo JobState=COMPLETING BatchHost=a")
    assert heir.inherit(folder, 1, "b") is None
    asked = fake("case $0 in *sbatch) echo 6;; *) echo JobState=RUNNING BatchHost=a ExcNodeList=c;; esac")
    assert heir.inherit(folder, 1, "b") == "6"
    assert heir.inherit(folder, 1, "d") is None
    said = asked.read_text().splitlines()
    assert f"sbatch --parsable --exclude=a,c {folder.home}/job.sbatch" in said
    assert [line for line in said if "scancel" in line] == ["scancel 5"]
    assert read(folder.home / "job.json") == {"job": "6"}


def test_a_rank_that_was_asked_to_stop_may_take_long_to_leave_but_not_halted() -> None:
    limits = Limits(hang_seconds=8.0, save_seconds=60.0)
    leaving = RankReport(0, 1, step=3, beats=4, still_seconds=20.0)
    report = NodeReport(0, "n1", 1, (leaving,))
    assert judge([report], {}, limits) is not None
    assert judge([report], {}, limits, stopping=True) is None
    halted = RankReport(1, 2, step=3, beats=4, still_seconds=20.0, stopped=True, halted_seconds=8.5)
    verdict = judge([replace(report, ranks=(leaving, halted))], {}, limits, stopping=True)
    assert verdict is not None
    assert (verdict.outcome, verdict.rank, verdict.host) == ("hung", 1, "n1")
    assert "halted by a signal (SIGSTOP) in its end" in verdict.cause


def test_limits_of_earlier_plans_are_read(folder: LaunchFolder) -> None:
    """A plan of an earlier release has no limit for agents."""
    page = read(folder.home / "plan.json")
    assert page is not None
    del page["limits"]["agent_seconds"], page["min_nodes"]
    write(folder.home / "plan.json", page)
    assert folder.plan().limits == Limits()
