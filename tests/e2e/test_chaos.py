"""Killed at random, training always goes on from a whole checkpoint and ends as if nobody had."""

from pathlib import Path

import pytest

from tests.e2e.chaos import chaos


def test_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    tally = chaos(tmp_path, kills=5, seed=3, say=said.append)
    assert tally.kills == 5, said
    assert tally.within_saves >= 1, said


def test_nor_do_they_when_training_waits_for_saves(tmp_path: Path) -> None:
    assert chaos(tmp_path, kills=2, seed=4, say=lambda _: None, asynchronous=False).kills == 2


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_kills_change_nothing(tmp_path: Path) -> None:
    """As many as there is time for; `python -m tests.e2e.chaos --kills 50` shows more."""
    said: list[str] = []
    tally = chaos(tmp_path, kills=20, seed=5, say=said.append)
    assert tally.kills == 20, said
    assert tally.within_saves >= 4, said
