"""Tasks of Ray: the bytes of a local run, and every failed one ends the whole and is named."""

import sys
from pathlib import Path

import pytest

from data_prep import executors
from data_prep.treatment import RayExecutor
from moe.errors import LaunchError
from tests.unit.corpus import contents, prepared, write_jsonl
from tests.unit.failing import units
from tests.unit.test_executors import ENDS, ends


def test_without_ray_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with executors.workers(RayExecutor(type="ray")) as at_work:
        assert executors.run([], at_work) == 0
        with pytest.raises(LaunchError, match=r"pip install 'turnout\[ray\]'"):
            executors.run(units(tmp_path, "well"), at_work)


@pytest.mark.slow
def test_through_ray_the_bytes_are_those_of_a_local_run(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'turnout[ray]'")
    made = []
    sources = [{"type": "jsonl", "paths": [str(write_jsonl(tmp_path / f"{n}.jsonl"))]} for n in range(2)]
    for executor in ({"type": "ray", "workers": 2}, {"type": "local", "workers": 1}):
        folder = tmp_path / str(executor["type"])
        folder.mkdir()
        data = prepared(folder, sources, duplicates={"near": {}}, executor=executor)
        made.append(contents(data.folder))
    assert made[0] == made[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "refused", "exits 0", "hangs"])
def test_a_part_that_ends_badly_on_ray_ends_the_stage_and_is_named(tmp_path: Path, how: str) -> None:
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'turnout[ray]'")
    limit = 0.05 if how == "hangs" else None
    said = ends(tmp_path, how, RayExecutor(type="ray", workers=2, part_minutes=limit))
    assert ENDS[how] in said


@pytest.mark.slow
def test_a_task_that_no_node_of_ray_could_begin_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'turnout[ray]'")
    with (
        executors.workers(RayExecutor(type="ray", workers=2, cpus=3)) as at_work,
        pytest.raises(LaunchError, match=r"executor.cpus is 3, but no node of Ray has more than 2"),
    ):
        executors.run(units(tmp_path, "well"), at_work)
