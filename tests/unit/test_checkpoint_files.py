"""Tensor files, manifests and retention on their own: no engine, no ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from moe.checkpoint import folder as folders
from moe.checkpoint import retention, tensors
from moe.checkpoint.folder import Layout
from moe.checkpoint.read import SavedModel
from moe.checkpoint.tensors import Reader
from moe.checkpoint.write import Snapshot, write
from moe.config import RunConfig
from moe.dist import Ranks
from moe.errors import CheckpointError

STATE = {
    "weight/a": torch.tensor([[1.5, -0.0], [3.0, float("nan")]]),
    "weight/b[0]": torch.arange(6.0).view(2, 3).t(),
    "weight/nothing": torch.empty(0, 4),
    "weight/one": torch.tensor(2.5),
    "steps_since_use": torch.arange(5),
    "half": torch.randn(3).bfloat16(),
    "bytes": torch.arange(7, dtype=torch.uint8),
}


@pytest.fixture
def run(tiny_page: dict[str, Any], tmp_path: Path) -> RunConfig:
    return RunConfig.model_validate(tiny_page | {"run_dir": str(tmp_path / "run")})


def _save(run: RunConfig, step: int) -> Path:
    write(run, Snapshot(step, 10 * step, "data", STATE, {"cpu": torch.get_rng_state()}), Ranks())
    return folders.step_folder(run.folder, step)


def test_the_writer_s_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    file, saved = tensors.write(path, STATE)
    read = load_file(path)
    assert read.keys() == STATE.keys() == saved.keys()
    for key, tensor in STATE.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), key
        assert saved[key].xxh3 == xxhash.xxh3_128_hexdigest(read[key].view(-1).view(torch.uint8).numpy())
        assert saved[key].shape == tuple(tensor.shape)
    assert file.size == path.stat().st_size
    assert file.xxh3 == folders.hash_file(path)
    assert path.stat().st_mode & 0o777 == _plain_mode(tmp_path)
    with safe_open(path, framework="np") as opened:
        assert set(opened.keys()) == STATE.keys()


def _plain_mode(folder: Path) -> int:
    path = folder / "plain"
    path.touch()
    return path.stat().st_mode & 0o777


def test_a_tensor_that_is_not_the_manifest_s_is_named_though_the_file_s_hash_is_right(run: RunConfig) -> None:
    folder = _save(run, 3)
    manifest = folders.read_manifest(folder)
    assert tensors.verify(folder, manifest) == len(STATE)
    other = STATE | {"weight/b[0]": STATE["weight/b[0]"].neg()}
    file, _ = tensors.write(folder / "state-00000.safetensors", other)
    page = json.loads((folder / "manifest.json").read_text())
    page["files"]["state-00000.safetensors"] = vars(file)
    for key in ("format", "version", "xxh3"):
        del page[key]
    tampered = folders.manifest_from(page)
    folders.write_manifest(folder, tampered)
    folders.verify(folder, folders.read_manifest(folder))
    with pytest.raises(CheckpointError, match=r"state-00000.*weight/b\[0\] does not have the hash"):
        tensors.verify(folder, folders.read_manifest(folder))


def test_the_manifest_says_layout_shapes_and_hashes(run: RunConfig) -> None:
    manifest = folders.read_manifest(_save(run, 3))
    assert manifest.layout == Layout(1, 1, 1, 2)
    assert str(manifest.layout) == "1 rank x EP 1 x ZeRO 1, micro-batch 2"
    assert manifest.tensors["weight/b[0]"].shape == (3, 2)
    assert manifest.tensors["weight/b[0]"].xxh3 == tensors.hash_of(STATE["weight/b[0]"])
    assert (manifest.step, manifest.tokens, manifest.next_sample) == (3, 30, 24)


def test_version_1_is_read_and_has_no_hashes_of_tensors(run: RunConfig) -> None:
    folder = _save(run, 3)
    downgrade(folder)
    saved = SavedModel.open(run.folder)
    assert saved.manifest.layout == Layout(1, None, None, None)
    assert str(saved.manifest.layout) == "1 rank x EP ? x ZeRO ?, micro-batch ?"
    assert torch.equal(*saved.pieces("one"), STATE["weight/one"])
    assert tensors.verify(folder, saved.manifest) == 0


def downgrade(folder: Path) -> None:
    """Write the manifest as version 1 did."""
    path = folder / folders.MANIFEST
    page = json.loads(path.read_text())
    content = {key: page[key] for key in page if key not in ("format", "version", "xxh3", "layout")}
    content["world_size"] = page["layout"]["world_size"]
    content["tensors"] = {key: tensor["file"] for key, tensor in page["tensors"].items()}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    path.write_text(json.dumps({"format": folders.FORMAT, "version": 1, "xxh3": digest, **content}))


def test_a_failed_save_leaves_nothing_of_itself_and_all_of_the_others(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _save(run, 1)
    content = {path.name: path.read_bytes() for path in before.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "write", full)
    with pytest.raises(CheckpointError, match=r"rank 0 could not write to .*No space left.*as they were"):
        _save(run, 2)
    assert [path.name for path in before.parent.iterdir()] == ["step_1"]
    assert {path.name: path.read_bytes() for path in before.iterdir()} == content


@pytest.mark.parametrize("moment", [0, 1])
def test_a_removal_that_is_cut_leaves_no_half_of_a_checkpoint(
    moment: int, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        _save(run, step)
    real = shutil.rmtree
    calls = []

    def cut(path: Path, *_: object, **__: object) -> None:
        if path.is_dir():
            calls.append(path)
            if moment:
                next(iter(path.glob("manifest*"))).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut)
    with pytest.raises(KeyboardInterrupt):
        retention.remove(run.folder, [1])
    monkeypatch.setattr(shutil, "rmtree", real)
    assert len(calls) == 1
    assert folders.steps(run.folder) == [2]
    _save(run, 3)
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["step_2", "step_3"]


@given(
    steps=st.sets(st.integers(1, 60)).map(sorted),
    keep=st.integers(1, 8),
    every=st.none() | st.integers(1, 20),
)
def test_the_newest_and_the_milestones_are_never_surplus(
    steps: list[int], keep: int, every: int | None
) -> None:
    gone = set(retention.surplus(steps, keep, every))
    left = [step for step in steps if step not in gone]
    assert left[-keep:] == steps[-keep:]
    assert not [step for step in gone if every is not None and step % every == 0]
    assert all(step in steps[-keep:] or (every is not None and step % every == 0) for step in left)


def test_milestones_stay_while_a_run_prunes(run: RunConfig) -> None:
    checkpoint = run.checkpoint.model_copy(update={"keep": 2, "keep_every": 4, "every_steps": 1})
    run = run.model_copy(update={"checkpoint": checkpoint})
    for step in range(1, 8):
        _save(run, step)
    assert folders.steps(run.folder) == [4, 6, 7]


def test_a_reader_names_the_tensor_that_is_not_there(run: RunConfig) -> None:
    folder = _save(run, 3)
    with (
        Reader(folder, folders.read_manifest(folder)) as reader,
        pytest.raises(CheckpointError, match="has no tensor x"),
    ):
        reader.get("x")
