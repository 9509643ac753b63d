"""Whatever happens to a run, it ends by itself with the weights of one that nothing happened to."""

import random
from itertools import pairwise

import pytest

from tests.cluster import faults, stops
from tests.cluster.conftest import Place
from tests.cluster.cost import Fault, suffer, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.nightly, pytest.mark.timeout(3000)]


@pytest.mark.parametrize("fault", faults.FAULTS.values(), ids=list(faults.FAULTS))
def test_a_fault_costs_no_more_steps_than_it_may_and_not_a_bit_of_the_weights(
    fault: Fault, place: Place
) -> None:
    expected, run = undisturbed(place, fault.steps), faults.folder(fault)
    cost = suffer(place, run, fault)
    assert place.losses(run) == place.losses(expected)
    assert place.weights(run) == place.weights(expected)
    assert cost.attempts[0].outcome == fault.outcome
    assert cost.attempts[-1].outcome == "done"
    assert cost.lost <= fault.most_lost


def test_planned_stops_lose_no_step_and_are_requeues_of_one_job(place: Place) -> None:
    dice, run = random.Random(2), "runs/stops"
    expected = stops.stopped(place, run, stops.drawn(20, dice), dice)
    attempts = place.attempts(run)
    assert [stops.faulty(*pair) for pair in pairwise(attempts)] == [None] * 20
    assert stops.requeues(place, run) == 20
    assert place.weights(run) == place.weights(expected)
