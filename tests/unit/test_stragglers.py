"""The rank that the others wait for is named with its host, from samples of where its main thread stands."""

import sys
from dataclasses import replace
from types import FrameType

from launch import stragglers
from launch.folder import NodeReport, RankReport
from moe import attempt

RANK = RankReport(rank=0, pid=1, step=30, beats=31, works=0.10, waits=0.10)


def _nodes(*ranks: RankReport) -> list[NodeReport]:
    numbered = [replace(rank, rank=number) for number, rank in enumerate(ranks)]
    return [NodeReport(0, "n1", 7, tuple(numbered[:2])), NodeReport(1, "n2", 7, tuple(numbered[2:]))]


def test_nobody_is_slow_where_all_are_alike_or_nothing_is_known() -> None:
    a_little_more = replace(RANK, works=0.13, waits=0.07)
    assert list(stragglers.sentences(_nodes(a_little_more, RANK, RANK, RANK))) == []
    short = replace(RANK, works=0.05, waits=0.35)
    twice_of_little = replace(RANK, works=0.10, waits=0.30)
    assert list(stragglers.sentences(_nodes(twice_of_little, short, short, short))) == []
    assert list(stragglers.sentences(_nodes(*[replace(RANK, works=0.0, waits=0.0)] * 4))) == []
    assert list(stragglers.sentences([NodeReport(0, "n1", 7, (RANK,))])) == []


def test_a_slow_rank_is_named_with_its_host() -> None:
    slow = replace(RANK, works=0.19, waits=0.01)
    assert list(stragglers.sentences(_nodes(RANK, RANK, RANK, slow))) == [
        "n2 is slow: rank 3 there works 0.190 s in a step, others 0.100 s and wait"
    ]


def test_a_slow_host_is_named_once() -> None:
    slow = replace(RANK, works=0.19, waits=0.01)
    assert list(stragglers.sentences(_nodes(slow, slow, RANK, RANK))) == [
        "n1 is slow: every rank there works 0.190 s in a step, others 0.100 s and wait"
    ]


def _frame(path: str) -> FrameType:
    names: dict[str, FrameType] = {}
    exec(compile("import sys\nframe = sys._getframe()", path, "exec"), names)
    return names["frame"]


def test_a_thread_in_a_collective_waits_and_elsewhere_works() -> None:
    pace = attempt.Pace()
    pace.count = 1
    pace.sample(_frame("/x/moe/model/block.py"), 0.3)
    assert pace.by_step == (0.0, 0.0)  # no step is known yet
    pace.count = 3
    for _ in range(2):
        pace.sample(_frame("/x/torch/distributed/distributed_c10d.py"), 0.05)
    works, waits = pace.by_step
    assert abs(works - 0.15) < 0.001
    assert abs(waits - 0.05) < 0.001


def test_a_process_that_is_not_let_run_holds_up_its_peers_wherever_it_stands() -> None:
    pace = attempt.Pace()
    pace.count = 1
    for _ in range(100):
        pace.count += 1
        pace.sample(_frame("/x/torch/distributed/distributed_c10d.py"), 0.275)
    works, waits = pace.by_step
    assert abs(works - 0.2) < 0.01
    assert abs(waits - 0.075) < 0.01


def test_what_was_long_ago_counts_no_more() -> None:
    pace = attempt.Pace()
    pace.count = 1
    for path, times in (("/x/moe/model/block.py", 1000), ("/x/deepspeed/comm/comm.py", 20_000)):
        frame = _frame(path)
        for _ in range(times):
            pace.count += 1
            pace.sample(frame, 0.05)
    works, waits = pace.by_step
    assert works < 0.001 < 0.049 < waits


def test_the_main_thread_is_looked_at_as_it_stands() -> None:
    assert attempt._waits(sys._getframe()) is False
