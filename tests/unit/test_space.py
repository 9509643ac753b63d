"""Room for checkpoints: how much they take, how many must be there at once, and a refusal that names both."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moe import optim, train
from moe.checkpoint import space
from moe.checkpoint.folder import File, Layout, Manifest, read_manifest, write_manifest
from moe.config import RunConfig
from moe.errors import CheckpointError, ConfigError
from moe.model import Transformer
from moe.sparse import deepep
from tests.unit.corpus import raw_data

Page = dict[str, Any]


def _run(page: Page, folder: Path, **checkpoint: object) -> RunConfig:
    return RunConfig.model_validate(page | {"run_dir": str(folder / "run"), "checkpoint": checkpoint})


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_estimate_is_what_the_tensors_take(
    kind: str, tied: bool, tiny_page: Page, tmp_path: Path
) -> None:
    tiny_page["model"]["tie_embeddings"] = tied
    tiny_page["train"]["optimizer"]["kind"] = kind
    run = _run(tiny_page, tmp_path)
    model = Transformer(run.model)
    exact = 4 * sum(
        parameter.numel() * (1 + len(optim.states(group)))
        for group in optim.parameter_groups(model, run.train.optimizer)
        for parameter in group["params"]
    )
    assert space.num_bytes(run) == pytest.approx(exact, rel=0 if kind == "adamw" else 0.005)


def _there(run: RunConfig, *steps: int, size: int) -> Manifest:
    for step in steps:
        folder = run.folder / "checkpoints" / f"step_{step}"
        folder.mkdir(parents=True)
        manifest = Manifest(step, step, step, Layout.of(run, 1), "", {"state": File(size, "")}, {})
        write_manifest(folder, manifest)
    return read_manifest(folder)


@pytest.mark.parametrize(
    ("there", "checkpoint", "needed"),
    [
        ((), {}, 1),  # the last step's
        ((), {"every_steps": 1}, 1),  # all are kept: a warning is enough
        ((), {"every_steps": 1, "keep": 2}, 3),
        ((), {"every_steps": 4, "keep": 5}, 2),  # of 8 steps
        ((2,), {"every_steps": 1, "keep": 2}, 2),
        ((1, 2, 3, 4), {"every_steps": 1, "keep": 2}, 1),
    ],
)
def test_what_is_held_at_once_must_fit(
    there: tuple[int, ...], checkpoint: dict[str, int], needed: int, tiny_page: Page, tmp_path: Path
) -> None:
    run = _run(tiny_page, tmp_path, **checkpoint)
    newest = _there(run, *there, size=5_000_000) if there else None
    size = 5_000_000 if there else space.num_bytes(run)
    space.check(run, newest, free=needed * size)
    with pytest.raises(CheckpointError, match="Make room") as refused:
        space.check(run, newest, free=needed * size - 1)
    assert f"a checkpoint takes {'5 MB' if there else '770 kB'}, " in str(refused.value)
    assert ("set a smaller checkpoint.keep" in str(refused.value)) == (needed > 1)


@pytest.mark.parametrize(
    ("checkpoint", "most"),
    [
        ({"every_steps": 1}, 8),
        ({"every_steps": 2, "keep": 1, "keep_every": 4}, 4),
        ({"every_steps": 1, "keep": 2}, 3),
    ],
)
def test_what_fills_up_by_and_by_is_a_caution(
    checkpoint: dict[str, int], most: int, tiny_page: Page, tmp_path: Path
) -> None:
    run = _run(tiny_page, tmp_path, **checkpoint)
    needed = most * space.num_bytes(run)
    assert space.caution(run, 0, free=needed) is None
    assert f"adds {most} checkpoints of 770 kB to" in str(space.caution(run, 0, free=needed - 1))


def test_a_run_that_is_done_needs_no_room(tiny_page: Page, tmp_path: Path) -> None:
    run = _run(tiny_page, tmp_path, every_steps=1)
    space.check(run, _there(run, 8, size=1), free=0)


class _Usage(NamedTuple):
    free: int


def test_training_is_refused_before_it_starts(
    tiny_page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data(tmp_path / "data", {"train": [[2, 3, 4] * 30 + [0]]}, vocab_size=500)
    tiny_page["data"]["path"] = str(tmp_path / "data")
    run = _run(tiny_page, tmp_path, every_steps=1, keep=3)
    asked = []

    def usage(path: Path) -> _Usage:
        asked.append(path)
        return _Usage(10**6)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(CheckpointError, match=r"4 more of them at once, .* MB, but 1 MB are free"):
        train.preflight(run, 1)
    assert asked == [tmp_path]
    assert not run.folder.exists()


def test_what_has_to_be_installed_is_looked_for_where_ranks_will_be(
    tiny_page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that hands a job to others may have no GPU, and no kernels for one."""
    raw_data(tmp_path / "data", {"train": [[2, 3, 4] * 30 + [0]]}, vocab_size=500)
    tiny_page["data"]["path"] = str(tmp_path / "data")
    tiny_page["train"]["precision"] = "bf16"
    tiny_page["parallel"] = {"expert_parallel_size": 2, "dispatch": "deepep"}
    run = RunConfig.model_validate({**tiny_page, "run_dir": str(tmp_path / "run")})
    monkeypatch.setattr(deepep, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"deep_ep is not installed.*parallel\.dispatch=all_to_all"):
        train.preflight(run, 2)
    assert train.preflight(run, 2, elsewhere=True).num_tokens("train")
