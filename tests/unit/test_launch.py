"""Launching without launching: verdicts, plans, scripts, hostfiles, owner tokens, and what is refused."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch import allocation, diagnosis, hosts, machine, port, slurm, start
from launch.allocation import Node
from launch.awake import Awake
from launch.diagnosis import ALL, Finding, Wanted, diagnose
from launch.folder import Attempt, LaunchFolder, Limits, NodeReport, Plan, RankReport, fruitless, write_text
from launch.look import story
from launch.measure import rounds
from launch.rank import Rank
from launch.slurm import Place, Request, script
from launch.testbed import command as testbed
from launch.verdict import Verdict, culprit, judge, unlost
from moe import attempt as attempts
from moe.checkpoint.lock import held
from moe.cli import turnout
from moe.errors import CheckpointError, LaunchError
from tests.cluster import conftest as cluster

LIMITS = Limits(boot_seconds=60, hang_seconds=10, lease_seconds=5)
ALIVE = RankReport(rank=0, pid=1, step=3, beats=4)
IN_COLLECTIVE = """Current thread 0x01 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 3122 in all_reduce
  File "/x/moe/dist.py", line 100 in sum
"""
IN_READ = """Thread 0x02 (most recent call first):
  File "/x/threading.py", line 1 in wait

Current thread 0x01 (most recent call first):
  File "/x/moe/data/loader.py", line 88 in read
  File "/x/moe/train.py", line 120 in train
"""


def _node(node: int, *ranks: RankReport, ended: bool = False) -> NodeReport:
    return NodeReport(node, f"n{node + 1}", 7, ranks, None, ended)


def test_an_attempt_that_goes_well_has_no_verdict() -> None:
    assert judge([_node(0, ALIVE), _node(1, replace(ALIVE, rank=1))], {0: 1.0, 1: 1.0}, LIMITS) is None


def test_a_rank_ended_by_a_signal_is_named_before_the_peers_that_complain_of_it() -> None:
    peer = replace(ALIVE, rank=0, code=1, seconds_dead=2.0)
    killed = replace(ALIVE, rank=3, code=-9, seconds_dead=1.0)
    verdict = judge([_node(0, peer), _node(1, killed)], {}, LIMITS)
    assert verdict is not None
    assert (verdict.outcome, verdict.rank, verdict.host) == ("failed", 3, "n2")
    assert verdict.cause == "ended by SIGKILL"


def test_of_ranks_that_failed_the_longest_dead_is_named() -> None:
    late, early = (
        replace(ALIVE, rank=rank, code=1, seconds_dead=dead) for rank, dead in ((0, 0.5), (1, 0.9))
    )
    verdict = judge([_node(0, late, early)], {}, LIMITS)
    assert verdict is not None
    assert verdict.rank == 1


def test_what_the_ranks_refuse_is_told_from_what_fails() -> None:
    verdict = judge([_node(0, replace(ALIVE, code=2))], {}, LIMITS)
    assert verdict is not None
    assert verdict.outcome == "refused"


def test_a_silent_node_is_lost_and_one_that_has_ended_is_not() -> None:
    verdict = judge([_node(0, ALIVE), _node(1, ALIVE)], {0: 0.1, 1: 5.1}, LIMITS)
    assert verdict is not None
    assert (verdict.outcome, verdict.host) == ("lost", "n2")
    assert judge([_node(0, replace(ALIVE, code=0), ended=True)], {0: 99.0}, LIMITS) is None


@pytest.mark.parametrize(
    ("beats", "still", "hung"), [(0, 11.0, False), (0, 61.0, True), (5, 9.0, False), (5, 11.0, True)]
)
def test_a_rank_may_boot_for_longer_than_it_may_take_a_step(beats: int, still: float, hung: bool) -> None:
    verdict = judge([_node(0, replace(ALIVE, beats=beats, still_seconds=still))], {}, LIMITS)
    assert (verdict is not None) == hung


@pytest.mark.parametrize(("beats", "halted", "named"), [(0, 10.5, True), (0, 9.5, False), (4, 10.5, False)])
def test_a_rank_halted_in_its_boot_is_found_by_the_limit_of_a_step(
    beats: int, halted: float, named: bool
) -> None:
    """Later it is found by its peers, which take no step without it."""
    booting = replace(ALIVE, step=None, beats=beats, still_seconds=9.0)
    rank = replace(booting, rank=2, stopped=True, halted_seconds=halted)
    verdict = judge([_node(0, booting), _node(1, rank)], {}, LIMITS)
    assert (verdict is not None) == named
    if verdict is not None:
        assert (verdict.outcome, verdict.rank, verdict.host) == ("hung", 2, "n2")
        assert "halted by a signal" in verdict.cause


def test_a_rank_that_a_debugger_holds_in_its_boot_has_the_time_of_a_boot() -> None:
    rank = replace(ALIVE, step=None, beats=0, still_seconds=50.0, stopped=True, halted_seconds=0.0)
    assert judge([_node(0, rank)], {}, LIMITS) is None


class _Clock(Awake):
    """That goes on when it is told to."""

    def seconds(self) -> float:
        return self.passed


def test_a_halted_process_counts_until_it_goes_on(tmp_path: Path) -> None:
    process, clock = subprocess.Popen(["sleep", "1000"]), _Clock(passed=3.0)
    try:
        rank = Rank(0, process, tmp_path / "beat", tmp_path / "stacks", clock, 0.0)
        rank.look()
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        clock.passed = 5.0
        rank.look()
        clock.passed = 5.2
        report = rank.report()
        assert report.stopped
        assert report.halted_seconds == 0.2
        process.send_signal(signal.SIGCONT)
        os.waitpid(process.pid, os.WCONTINUED)
        rank.look()
        assert (rank.report().stopped, rank.report().halted_seconds) == (False, 0.0)
    finally:
        process.kill()
        process.wait()


def test_the_time_in_which_a_whole_job_is_suspended_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [10.2, 10.4, 1000.4, 1000.6]
    monkeypatch.setattr(time, "monotonic", lambda: times.pop(0))
    clock = Awake(last=10.0)
    assert [round(clock.seconds(), 1) for _ in range(4)] == [0.2, 0.4, 2.4, 2.6]


@pytest.mark.parametrize(
    ("srun", "said", "outcome", "host"),
    [
        (None, "srun: error: Node failure on n2", "lost", "n2"),
        (1, "srun: error: Node failure on n2", "lost", "n2"),
        (-9, "", "failed", None),
        (None, "srun: first\nsrun: error: n2: task 1: Killed\n", "failed", "n2"),
        (None, "srun: error: n1: task 0: Killed\n", "lost", "n2"),
    ],
)
def test_a_node_is_not_lost_whose_agent_was_killed_or_srun_with_all_of_them(
    srun: int | None, said: str, outcome: str, host: str | None
) -> None:
    lost = Verdict("lost", "node n2 has not been heard of for 5 s", 2, "n2")
    verdict = unlost(lost, srun, said)
    assert (verdict.outcome, verdict.host) == (outcome, host)


def test_of_a_hang_the_halted_rank_is_the_culprit() -> None:
    waiting = replace(ALIVE, stack=IN_COLLECTIVE)
    verdict = culprit([_node(0, waiting), _node(1, replace(ALIVE, rank=1, stopped=True))])
    assert (verdict.rank, verdict.host) == (1, "n2")
    assert "SIGSTOP" in verdict.cause


def test_of_a_hang_the_rank_outside_of_the_collective_is_the_culprit_and_where_it_is() -> None:
    waiting = [replace(ALIVE, rank=rank, stack=IN_COLLECTIVE) for rank in (0, 1, 3)]
    reading = replace(ALIVE, rank=2, stack=IN_READ)
    verdict = culprit([_node(0, *waiting[:2]), _node(1, reading, waiting[2])])
    assert (verdict.rank, verdict.host) == (2, "n2")
    assert "read (/x/moe/data/loader.py:88) while 3 others wait" in verdict.cause


def test_of_a_hang_the_rank_that_does_not_answer_is_the_culprit() -> None:
    verdict = culprit([_node(0, replace(ALIVE, stack=IN_COLLECTIVE), replace(ALIVE, rank=1))])
    assert verdict.rank == 1


def test_attempts_without_a_new_checkpoint_are_counted_from_the_last() -> None:
    failed = Attempt(1, "t", ("a",), 0.0, 10, ended=1.0, outcome="failed", to_step=10)
    assert fruitless([]) == 0
    assert fruitless([failed, failed, failed]) == 3
    assert fruitless([failed, replace(failed, to_step=20), failed]) == 1
    assert fruitless([failed, replace(failed, outcome="saved"), failed, failed]) == 2
    assert fruitless([failed, replace(failed, outcome="left"), failed, replace(failed, outcome="left")]) == 2


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan("slurm", str(tmp_path / "run"), str(tmp_path), sys.executable, 2, 4, cpus_per_rank=3)


def test_a_plan_and_an_attempt_are_read_as_they_were_written(plan: Plan, tmp_path: Path) -> None:
    folder = LaunchFolder(tmp_path / "run")
    folder.home.mkdir(parents=True)
    plan = replace(plan, hosts=("a", "b"), environment={"A": "1"}, limits=LIMITS)
    folder.write_plan(plan)
    assert folder.plan() == plan
    attempt = Attempt(1, "token", ("a", "b"), 5.0, 10)
    folder.attempt_folder(1).mkdir()
    folder.write_attempt(attempt)
    assert folder.attempts() == [attempt]
    report = _node(1, replace(ALIVE, stack=IN_READ))
    folder.write_report(1, report)
    assert folder.reports(1) == [report]


def test_a_batch_script_asks_for_what_was_asked_for_and_passes_shellcheck(plan: Plan, tmp_path: Path) -> None:
    request = Request(
        "demo", gpus_per_node=4, place=Place("main"), time="1:00:00", spares=1, modules=("cuda/12",)
    )
    page = script(LaunchFolder(tmp_path / "run"), plan, request, {"PATH": "/bin:/my bin"})
    for line in (
        "nodes=3",
        "gpus-per-node=4",
        "cpus-per-task=12",
        "partition=main",
        "signal=B:USR1@300",
        "requeue",
    ):
        assert f"#SBATCH --{line}\n" in page
    assert "module load cuda/12\nexport PATH='/bin:/my bin'\n" in page
    assert "--account" not in page
    subprocess.run(["bash", "-n"], input=page, text=True, check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", "-"], input=page, text=True, check=True)


def test_what_is_asked_of_slurm_cannot_become_a_line_of_the_script(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"--partition is 'main\\nrm'.*without a line break"):
        script(LaunchFolder(tmp_path / "run"), plan, Request("demo", place=Place("main\nrm")), {})


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_pass_shellcheck() -> None:
    scripts = [
        str(path) for path in Path(start.__file__).parent.rglob("*") if path.suffix in (".sh", ".sbatch")
    ]
    assert scripts
    subprocess.run(["shellcheck", *scripts], check=True)


def test_an_agent_is_started_once_a_node_under_every_launcher(plan: Plan, tmp_path: Path) -> None:
    folder, attempt = LaunchFolder(tmp_path / "run"), Attempt(3, "t", ("a", "b"), 0.0, 0)
    (srun,) = start.commands(folder, plan, attempt)
    assert srun[0] == "srun"
    assert {"--ntasks-per-node=1", "--nodelist=a,b", "--ntasks=2", "--cpus-per-task=12"} <= set(srun)
    one, two = start.commands(folder, replace(plan, kind="hosts", hosts=("a", "b")), attempt)
    assert (one[-2], two[-2]) == ("a", "b")
    assert two[-1].endswith("--attempt 3 --node 1")
    (deepspeed,) = start.commands(folder, replace(plan, kind="hosts", pdsh=True), attempt)
    assert "deepspeed.launcher.runner" in deepspeed
    assert start.hostfile(attempt, 4).endswith("a slots=1\nb slots=1\n")
    (local,) = start.commands(folder, replace(plan, kind="local"), attempt)
    assert local[0] == sys.executable


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("a slots=2\nb slots=4\n", "different numbers of slots"),
        ("a slots=two\n", "line 1: 'a slots=two' is no"),
        ("a slots=0\n", "line 1: 'a slots=0' is no"),
        ("-oProxyCommand=sh\n", "names the host '-oProxyCommand=sh', but a name begins with"),
        ("a\na\n", "names a twice"),
        ("# none\n", "names no host"),
    ],
)
def test_a_hostfile_is_refused_with_its_fault(page: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text(page)
    with pytest.raises(LaunchError, match=said):
        hosts.read(str(path))


def test_a_hostfile_gives_hosts_and_slots(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# ours\nn1 slots=8\nn2 slots=8  # the new one\n")
    assert hosts.read(str(path)) == (("n1", "n2"), 8)
    assert hosts.read("n1, me@n2") == (("n1", "me@n2"), None)


def test_a_hostfile_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_bytes(b"\xff\xfe")
    with pytest.raises(LaunchError, match="It must be text"):
        hosts.read(str(tmp_path / "hostfile"))


@pytest.mark.parametrize("limit", ["6", "5:01", "1:00:00", "1-0", "1-00:00", "0-00:05:01", "UNLIMITED"])
def test_a_time_limit_is_written_as_slurm_reads_it(limit: str) -> None:
    slurm.check_time(limit, 300)


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("5x", "--time is '5x', but must be"),
        ("", "--time is '', but must be"),
        ("-5", "--time is '-5', but must be"),
        ("0", "0 s, but --signal-before"),
        ("5", "300 s, but --signal-before lets the ranks save 300 s before it"),
    ],
)
def test_a_time_limit_that_leaves_no_time_is_refused(limit: str, said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        slurm.check_time(limit, 300)


def test_a_doctor_that_finds_no_node_to_look_at_does_not_call_it_sound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(allocation, "nodes", lambda place: {})
    result = CliRunner().invoke(turnout, ["doctor", "--on", "slurm", "--partition", "nowhere"])
    assert "Slurm has no node in nowhere" in str(result.exception)


def test_an_attempt_that_was_replaced_may_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts.check_owner(tmp_path)  # a rank that nobody owns
    (tmp_path / "launch").mkdir()
    monkeypatch.setenv(attempts.OWNER, "1 abc")
    with pytest.raises(CheckpointError, match="cannot be read"):
        attempts.check_owner(tmp_path)
    write_text(tmp_path / "launch/owner", "1 abc\n")
    attempts.check_owner(tmp_path)
    write_text(tmp_path / "launch/owner", "2 def\n")
    with pytest.raises(CheckpointError, match="belongs to attempt 2 by now, this is attempt 1"):
        attempts.check_owner(tmp_path)


def test_ranks_meet_at_a_port_that_is_free_and_that_no_connection_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws = [port.free_port("127.0.0.1") for _ in range(20)]
    assert len(set(draws)) > 10
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(given.read_text().split()[0]) if given.exists() else 32768
    assert first < 32768 or max(draws) < first
    with socket.socket() as held:
        held.bind(("127.0.0.1", draws[0]))
        monkeypatch.setattr(port, "_PORTS", draws[:1])
        with pytest.raises(LaunchError, match=r"none of 100 ports .*in use"):
            port.free_port("127.0.0.1")


def test_beats_tell_the_step_and_count_on(tmp_path: Path) -> None:
    path = tmp_path / "beat"
    beat = attempts.beats(2, {attempts.BEAT: str(path)})
    assert path.read_text().split()[:2] == ["2", "1"]
    beat(3)
    assert path.read_text().split()[:2] == ["3", "2"]
    attempts.beats(4, {})(5)


def test_a_process_shows_its_stacks_when_asked(tmp_path: Path) -> None:
    program = (
        "from moe import attempt; import time; attempt.show_stacks_on_request(); print(1, flush=True); "
        "time.sleep(600)"
    )
    path = tmp_path / "stacks"
    env = {**os.environ, attempts.STACKS: str(path)}
    process = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGUSR2)
        end = time.monotonic() + 120
        while "most recent call first" not in path.read_text():
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()


def test_explain_tells_each_attempt_and_the_first_failing_rank(tmp_path: Path) -> None:
    folder = LaunchFolder(tmp_path)
    first = Attempt(
        *(1, "t", ("n1", "n2"), 100.0, 10, "7", 130.0, "failed", 3, "n2", "ended by SIGKILL", 17, 10),
        then="started again",
    )
    second = Attempt(2, "u", ("n1", "n2"), 131.0, 10, "7")
    for attempt in (first, second):
        folder.attempt_folder(attempt.number).mkdir(parents=True)
        folder.write_attempt(attempt)
    lines = list(story(folder))
    assert lines[0] == (
        "attempt 1 on n1, n2 (job 7) from step 10: failed after 30 s at step 17: rank 3 on n2: ended by SIGKILL; "
        "7 steps lost; started again"
    )
    assert lines[-1] == "not done; newest checkpoint: step 0"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--on", "hosts"], "give --hosts"),
        (["--partition", "main"], "--partition means something with --on slurm alone"),
        (["--nodes", "2"], "this machine alone"),
        (["--gpus-per-node", "2", "--ranks-per-node", "2"], "Give one of them"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: list[str], said: str, tiny_page: dict[str, object], write_recipe: object
) -> None:
    path = write_recipe(tiny_page)  # type: ignore[operator]
    result = CliRunner().invoke(turnout, ["launch", str(path), *options])
    assert isinstance(result.exception, LaunchError)
    assert said in str(result.exception)


def test_a_folder_that_was_never_launched_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(turnout, ["explain", str(tmp_path)])
    assert "was not started by `turnout launch`" in str(result.exception)


def test_a_testbed_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LaunchError, match="you are not root"):
        testbed.check(slurm=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(LaunchError, match="apt install --no-install-recommends iproute2 munge"):
        testbed.check(slurm=True)


def test_tests_on_a_testbed_say_why_they_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "one must be root" in cluster.lacking()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert "slurmctld" in cluster.lacking()
    assert "no apt-get" in cluster.lacking()


def test_the_next_attempt_waits_for_the_lock_of_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import sys, time, pathlib\nfrom moe.checkpoint.lock import held\n"
        "with held(pathlib.Path(sys.argv[1])):\n    print(1, flush=True)\n    sys.stdin.readline()\n    time.sleep(1)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()
    with pytest.raises(CheckpointError, match="is in use"), held(tmp_path):
        pass
    monkeypatch.setenv(attempts.OWNER, "2 abc")
    (tmp_path / "launch").mkdir()
    write_text(tmp_path / "launch/owner", "2 abc\n")
    process.stdin.write("let go in a second\n")
    process.stdin.flush()
    with held(tmp_path):
        pass
    process.communicate()


HERE = {"torch": "2.13", "turnout": "0.1"}


def _well(**more: object) -> dict[str, object]:
    return {
        "versions": HERE,
        "clock": 0.01,
        "clock_error": 0.1,
        "folder_fault": "",
        "free_bytes": 10**12,
        "taken": [],
        "gpus": ["H100"] * 8,
        "faults": [],
    } | more


def test_a_doctor_finds_nothing_wrong_with_sound_hosts() -> None:
    assert diagnose({"a": _well(), "b": _well(clock=1.0), "c": _well()}, HERE, Wanted()) == []
    speeds = {("a", "b"): 400.0, ("a", "c"): 300.0, ("b", "c"): 900.0}
    assert diagnosis.speeds("abc", speeds, Wanted()) == []
    gpus = {"gpu": [700.0, 650.0], "nccl": "2.29"}
    assert diagnosis.computing({"a": gpus, "b": gpus}) == []
    assert diagnosis.computing({"a": {"cpu": [0.2]}, "b": {"cpu": [0.1]}}) == []


@pytest.mark.parametrize("others", ["a", "ab"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"versions": {"torch": "2.12", "turnout": "0.1"}}, "torch: 2.12 here, but 2.13 elsewhere"),
        ({"clock": 7.0}, "its clock is off by +7.0 s"),
        ({"clock": -7.0}, "its clock is off by -7.0 s"),
        ({"folder_fault": "/data: Read-only file system"}, "/data: Read-only file system"),
        ({"free_bytes": 10**8}, "the folder has 0.10 GB free, but 1.00 GB are wanted"),
        ({"taken": [29500]}, "port 29500 is taken"),
        ({"faults": ["/dev/shm cannot be written"]}, "/dev/shm cannot be written"),
    ],
)
def test_a_doctor_names_the_host_with_a_fault(fault: dict[str, object], said: str, others: str) -> None:
    found = diagnose({**dict.fromkeys(others, _well()), "c": _well(**fault)}, HERE, Wanted())
    assert [finding.what for finding in found if finding.host == "c"] == [said]
    assert {finding.host for finding in found} == {"c"}


def test_a_doctor_misses_a_gpu_and_hears_what_nvidia_smi_says() -> None:
    found = diagnose({"a": _well(), "b": _well(gpus=["H100"] * 7), "c": _well()}, {}, Wanted())
    assert found == [Finding("b", "GPUs: 7 x H100 here, but 8 x H100 elsewhere")]
    gpu = {"name": "H100", "driver": "550", "memory": "80 GiB", "ecc_errors": "[N/A]", "hot": "Not Active"}
    sound = gpu | {"braked": "Not Active"}
    assert machine.gpu_faults([sound, gpu | {"braked": "Not Supported"}]) == []
    assert machine.gpu_faults([sound, sound | {"ecc_errors": "3", "hot": "Active"}]) == [
        "GPU 1 has 3 uncorrected memory errors since it was reset",
        "GPU 1 is slowed down because it is hot",
    ]


def test_what_is_wrong_everywhere_is_no_fault_of_a_host() -> None:
    full = _well(free_bytes=10**8)
    (found,) = diagnose({"a": full, "b": full, "c": full}, HERE, Wanted())
    assert found == Finding(ALL, "the folder has 0.10 GB free, but 1.00 GB are wanted")


def test_a_doctor_names_the_device_that_computes_wrongly_or_slowly() -> None:
    said = {"a": {"gpu": [700.0, 0.0], "nccl": "2.29"}, "b": {"gpu": [120.0, 690.0], "nccl": "2.29"}}
    assert diagnosis.computing(said) == [
        Finding("a", "GPU 1 gets a product of matrices wrong"),
        Finding("b", "GPU 0 does 120 TFLOP/s, 690 is usual"),
    ]


def test_a_device_is_slow_only_if_it_is_twice_and_wrong_if_it_is_once() -> None:
    first = {"a": {"gpu": [700.0, 0.0, 90.0], "nccl": "2.29"}}
    again = {"a": {"gpu": [100.0, 690.0, 80.0], "nccl": "2.29"}}
    assert diagnosis.better(first, again) == {"a": {"gpu": [700.0, 0.0, 90.0], "nccl": "2.29"}}


def test_a_doctor_finds_who_is_behind_closed_doors() -> None:
    assert diagnosis.doors({"a": ["c"], "b": ["c"], "c": []}) == [
        Finding("c", "no connection between it and a, b")
    ]
    assert [found.host for found in diagnosis.doors({"a": [], "b": ["c"], "c": []})] == ["b", "c"]
    assert diagnosis.doors({"a": [], "b": []}) == []


@pytest.mark.parametrize("sound", ["ab", "abd"])
def test_a_doctor_finds_the_host_behind_the_slow_link(sound: str) -> None:
    speeds = {pair: 425.0 if "c" not in pair else 9.0 for pair in combinations(f"{sound}c", 2)}
    assert [found.host for found in diagnosis.speeds(f"{sound}c", speeds, Wanted())] == ["c"]


def test_a_doctor_names_both_ends_of_one_slow_link_and_what_is_less_than_wanted() -> None:
    speeds = dict.fromkeys(combinations("abcd", 2), 425.0) | {("b", "c"): 9.0}
    assert [found.host for found in diagnosis.speeds("abcd", speeds, Wanted())] == ["b", "c"]
    found = diagnosis.speeds("ab", {("a", "b"): 9.0}, Wanted(megabytes_per_second=100))
    assert [finding.host for finding in found] == ["a", "b"]


@pytest.mark.parametrize(
    ("state", "free", "out"),
    [("idle", True, False), ("mixed", True, False), ("allocated", False, False), ("down*", False, True),
     ("drained", False, True), ("idle*", False, True), ("idle~", True, False), ("completing", True, False)],
)  # fmt: skip
def test_a_node_that_slurm_has_out_is_told_from_one_that_is_busy(state: str, free: bool, out: bool) -> None:
    assert (Node(state, "").is_free, Node(state, "").is_out) == (free, out)


@pytest.mark.parametrize("nodes", [2, 3, 4, 7])
def test_a_doctor_measures_every_pair_once_and_no_host_twice_at_a_time(nodes: int) -> None:
    pairs = []
    for together in rounds(nodes):
        busy = [node for pair in together for node in pair]
        assert len(busy) == len(set(busy))
        pairs += together
    assert sorted(pairs) == sorted((low, high) for high in range(nodes) for low in range(high))
