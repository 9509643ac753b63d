"""Pieces of work at once: on OpenMP's threads, and on a pool where there are none."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from moe.sparse import team
from moe.sparse.team import together


@pytest.fixture(params=["as it is here", "in a pool"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "in a pool":
        monkeypatch.setattr(team, "_openmp", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_torch_here_shows_its_threads() -> None:
    """Else the other tests would try the pool twice."""
    if "backend: OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("torch here computes without OpenMP")
    assert team._openmp() is not None


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("number", [1, 2, 5])
def test_all_pieces_are_done_at_once(number: int) -> None:
    """Each waits for all others: one after the other they would never end."""
    meeting = threading.Barrier(number, timeout=60)
    seen: list[tuple[int, int, bool]] = []

    def piece() -> None:
        meeting.wait()
        seen.append((threading.get_ident(), torch.ones(100_000).sum().int().item(), torch.is_grad_enabled()))

    with torch.no_grad():
        together([piece] * number)
    assert len({thread for thread, _, _ in seen}) == number
    assert [rest for _, *rest in seen] == [[100_000, False]] * number


@pytest.mark.usefixtures("threads")
def test_torchs_operations_stay_on_their_threads() -> None:
    """Big products in two threads, as both would be by one: nothing waits for threads of its own."""
    a = torch.randn(300, 300, dtype=torch.float64)
    out = [torch.empty_like(a) for _ in range(2)]
    for _ in range(20):
        together([lambda o=o: torch.mm(a, a, out=o) for o in out])  # type: ignore[misc]
        assert torch.allclose(out[0], out[1], rtol=1e-12)
    assert torch.allclose(out[0], a @ a, rtol=1e-9)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_modes_are_the_callers(mode: Callable[[], AbstractContextManager[None]]) -> None:
    made: list[torch.Tensor] = []
    with mode():
        expected = torch.is_inference_mode_enabled()
        together([lambda: made.append(torch.ones(1))] * 2)
    assert [tensor.is_inference() for tensor in made] == [expected] * 2


def test_a_thread_that_is_ended_before_it_begins_leaves_nothing_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by what a signal's handler raises at the wrong moment; here OpenMP has no thread at all."""

    class NoThreads:
        def GOMP_parallel(self, *_: object) -> None:
            pass

    monkeypatch.setattr(team, "_openmp", NoThreads)
    done: list[int] = []
    together([lambda: done.append(1), lambda: done.append(2)])
    assert done == [1, 2]


def test_few_pieces_end_no_thread_of_torchs() -> None:
    """OpenMP would end those that a team leaves out, and torch's next operation start others."""
    if team._openmp() is None:
        pytest.skip("torch here computes without OpenMP")

    def threads() -> set[str]:
        return {task.name for task in Path("/proc/self/task").iterdir()}

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        numbers = torch.ones(1_000_000)
        numbers.add_(1)
        together([lambda: None] * 2)
        running, seen = threads(), set()
        for _ in range(20):
            numbers.add_(1)
            together([lambda: None] * 2)
            seen |= threads()
        assert len(seen - running) <= 2  # forty, if they were ended each time
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_fault_is_heard_of_and_the_next_time_works() -> None:
    done = []

    def fails() -> None:
        raise KeyError("lost")

    def lasts() -> None:
        time.sleep(0.05)
        done.append(1)

    with pytest.raises(KeyError, match="lost"):
        together([fails, lasts])
    assert done == [1]
    together([lambda: done.append(2)] * 2)
    assert done == [1, 2, 2]
