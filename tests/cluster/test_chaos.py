"""Random faults, several to a run: every run ends by itself with the weights of one that nothing happened to."""

import pytest

from tests.cluster.chaos import storms
from tests.cluster.conftest import Place

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.chaos]


@pytest.mark.parametrize(
    ("faults", "seed"),
    [
        pytest.param(10, 1, marks=pytest.mark.timeout(1800)),
        pytest.param(10, 2, marks=pytest.mark.timeout(1800)),
        pytest.param(200, 3, marks=[pytest.mark.nightly, pytest.mark.timeout(14400)]),
    ],
)
def test_random_faults_end_no_run_and_change_no_weights(faults: int, seed: int, place: Place) -> None:
    seen = list(storms(place, faults, seed))
    assert [str(storm) for storm in seen if storm.wrong] == []
    assert sum(len(storm.struck) for storm in seen) >= faults
