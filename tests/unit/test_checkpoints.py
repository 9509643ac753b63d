"""`turnout checkpoint` as a user meets it: list, verify, prune, resize; and what a kill in a resize leaves."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from moe import cli
from moe.checkpoint import folder as folders
from moe.checkpoint import identity, resize, retention, tensors
from moe.checkpoint.folder import Layout
from moe.checkpoint.keys import Key, writer
from moe.checkpoint.lock import held
from moe.checkpoint.read import SavedModel
from moe.checkpoint.write import Snapshot, write
from moe.config import RunConfig
from moe.dist import Ranks
from moe.errors import CheckpointError
from moe.model import Transformer, initialize
from moe.recipe import dump, load

Page = dict[str, Any]


def _hashes(folder: Path) -> dict[str, str | None]:
    return {key: saved.xxh3 for key, saved in folders.read_manifest(folder).tensors.items()}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _contents(folder: Path) -> dict[Path, bytes]:
    """Every file but the lock's."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def turnout(*arguments: object) -> Result:
    return CliRunner().invoke(cli.turnout, ["checkpoint", *map(str, arguments)])


def _refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1
    assert not [word for word in words if word not in result.stderr], result.stderr


def _state(run: RunConfig, step: int) -> dict[str, torch.Tensor]:
    """A whole state of the recipe's model, with moments that tell steps apart."""
    model = Transformer(run.model)
    initialize(model, step)
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            value = parameter.detach() * len(state)
            if ".experts." in name:
                found |= {f"{state}/{name}[{expert}]": part.clone() for expert, part in enumerate(value)}
            else:
                found[f"{state}/{name}"] = value
    found["steps_since_use"] = torch.arange(16).view(2, 8)
    return found


@pytest.fixture
def run(tiny_page: Page, tmp_path: Path) -> RunConfig:
    """A run of one rank with checkpoints of steps 2, 4 and 6, a torn save and a recipe that was extended."""
    checkpoint = {"every_steps": 2, "keep": 9, "keep_every": 4}
    page = tiny_page | {"run_dir": str(tmp_path / "run"), "checkpoint": checkpoint}
    run = RunConfig.model_validate(page)
    for step in (2, 4, 6):
        snapshot = Snapshot(step, 1000 * step, "data", _state(run, step), {"cpu": torch.get_rng_state()})
        write(run, snapshot, Ranks())
    torn = run.folder / "checkpoints/.torn-step_8"
    torn.mkdir()
    (torn / "state-00000.safetensors").write_bytes(b"half")
    (run.folder / "metrics.jsonl").write_text('{"step": 6}\n')
    longer = run.model_copy(update={"train": run.train.model_copy(update={"steps": 50})})
    (run.folder / "recipe.yaml").write_text(dump(longer))
    return run


def _flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_list_says_what_is_there(run: RunConfig) -> None:
    shard = run.folder / "checkpoints/step_4/state-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    result = turnout("list", run.folder)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].split() == ["checkpoint", "tokens", "saved", "(UTC)", "size", "layout", "state"]
    assert lines[1].startswith("step_2  ")
    assert "2,000" in lines[1]
    assert "1 rank x EP 1 x ZeRO 1, micro-batch 2  complete" in lines[1]
    assert [line.split()[0] for line in lines[1:5]] == ["step_2", "step_4", "step_6", ".torn-step_8"]
    assert [line.split()[-1] for line in lines[1:5]] == ["complete", "damaged", "complete", "torn"]
    assert "step_4 is damaged" in lines[5]
    assert "bytes" in lines[5]
    page = json.loads(turnout("list", run.folder, "--json").stdout)
    assert [entry["state"] for entry in page] == ["complete", "damaged", "complete", "torn"]
    assert (page[0]["step"], page[0]["tokens"]) == (2, 2000)
    assert page[0]["layout"]["expert_parallel_size"] == 1
    assert page[0]["num_bytes"] > 700_000


@pytest.mark.parametrize(
    "verb", [["list"], ["verify"], ["prune", "--keep", 1], ["resize", "--to", "world=1"]]
)
def test_a_folder_without_checkpoints_is_refused_and_left_alone(verb: list[object], tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        _refused(turnout(verb[0], folder, *verb[1:]), "holds no checkpoint", "train first")
    assert list(tmp_path.iterdir()) == []


def test_verify_hashes_files_and_tensors_and_names_the_first_bad_one(run: RunConfig) -> None:
    result = turnout("verify", run.folder)
    assert result.exit_code == 0, result.output
    count = len(_state(run, 2))
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["step_2", "step_4", "step_6"]
    assert f"step_4: 3 files, {count} tensors, " in result.stdout
    assert result.stdout.count("as written") == 3

    _flip(run.folder / "checkpoints/step_4/state-00000.safetensors")
    result = turnout("verify", run.folder)
    _refused(result, "step_4", "state-00000.safetensors", "does not have the hash")
    assert result.stdout.startswith("step_2:")
    assert turnout("verify", run.folder, "--step", 6).exit_code == 0
    _refused(turnout("verify", run.folder, "--step", 4), "step_4")
    _refused(turnout("verify", run.folder, "--step", 5), "no checkpoint of step 5", "It has 2, 4, 6")


def test_prune_keeps_the_newest_and_milestones(run: RunConfig) -> None:
    before = _names(run.folder / "checkpoints")
    result = turnout("prune", run.folder, "--keep", 1, "--dry-run")
    assert (result.exit_code, result.stdout) == (0, "would remove: step_2, .torn-step_8\n")
    assert _names(run.folder / "checkpoints") == before
    result = turnout("prune", run.folder, "--keep", 1)
    assert (result.exit_code, result.stdout) == (0, "removed: step_2, .torn-step_8\n")
    assert _names(run.folder / "checkpoints") == ["step_4", "step_6"]
    assert turnout("prune", run.folder, "--keep", 1).stdout == "removed: nothing\n"
    assert turnout("prune", run.folder, "--keep", 0).exit_code == 2
    assert _names(run.folder / "checkpoints") == ["step_4", "step_6"]


def test_prune_waits_for_no_run_and_trusts_no_damaged_newest(run: RunConfig) -> None:
    with held(run.folder):
        _refused(turnout("prune", run.folder, "--keep", 1), "is in use")
        _refused(turnout("resize", run.folder, "--to", "world=2"), "is in use")
    _flip(run.folder / "checkpoints/step_6/state-00000.safetensors")
    _refused(turnout("prune", run.folder, "--keep", 1), "step_6", "does not have the hash")
    assert folders.steps(run.folder) == [2, 4, 6]


LAYOUTS = {
    "world=4,ep=4,zero=2": (Layout(4, 4, 2, 2), [0, 1, 2, 3]),
    "world=2,ep=2,zero=0": (Layout(2, 2, 0, 2), [0, 1]),
    "world=8": (Layout(8, 1, 1, 1), range(8)),
    "world=2,micro=4": (Layout(2, 1, 1, 4), [0, 1]),
    "zero=2": (Layout(1, 1, 2, 2), [0]),
}


@pytest.mark.parametrize("wanted", LAYOUTS)
def test_resize_rewrites_parts_and_recipe_with_the_same_tensors(wanted: str, run: RunConfig) -> None:
    layout, ranks = LAYOUTS[wanted]
    folder = folders.step_folder(run.folder, 6)
    hashes, other = _hashes(folder), _hashes(folders.step_folder(run.folder, 4))
    result = turnout("resize", run.folder, "--to", wanted)
    assert result.exit_code == 0, (result.output, result.exception)
    assert (
        f"from 1 rank x EP 1 x ZeRO 1, micro-batch 2 to {layout}: {len(hashes)} tensors equal"
        in result.stdout
    )
    manifest = folders.read_manifest(folder)
    assert manifest.layout == layout
    assert _hashes(folder) == hashes
    assert {f"state-{rank:05d}.safetensors" for rank in ranks} | {"recipe.yaml"} == {
        name for name in manifest.files if not name.startswith("rng")
    }
    assert ("rng-00000.safetensors" in manifest.files) == (layout.world_size == 1)
    assert {path.name for path in folder.iterdir()} == {*manifest.files, "manifest.json"}
    folders.verify(folder, manifest)
    tensors.verify(folder, manifest)
    order = [name for name, _ in Transformer(run.model).named_parameters()]
    ep = layout.expert_parallel_size or 1
    for key, saved in manifest.tensors.items():
        rank = writer(Key.parse(key), order, 8, layout.world_size, ep)
        assert saved.file == f"state-{rank:05d}.safetensors"
    for path, steps in ((run.folder / "recipe.yaml", 50), (folder / "recipe.yaml", 8)):
        recipe = load(RunConfig, path)
        assert Layout.of(recipe, layout.world_size) == layout
        assert recipe.train.steps == steps
    identity.check(load(RunConfig, run.folder / "recipe.yaml"), "data")
    assert _hashes(folders.step_folder(run.folder, 4)) == other
    assert _names(folder.parent) == ["step_2", "step_4", "step_6"]


def test_resize_there_and_back_is_the_same_bytes(run: RunConfig) -> None:
    state = run.folder / "checkpoints/step_6/state-00000.safetensors"
    assert turnout("resize", run.folder, "--to", "world=1").exit_code == 0
    first = state.read_bytes()
    assert turnout("resize", run.folder, "--to", "world=4,ep=4,zero=2").exit_code == 0
    assert state.read_bytes() != first
    assert turnout("resize", run.folder, "--to", "world=1,ep=1,zero=1").exit_code == 0
    assert state.read_bytes() == first


def test_resize_into_a_new_folder_leaves_the_old_as_it_was(run: RunConfig, tmp_path: Path) -> None:
    before, new = _contents(run.folder), tmp_path / "new"
    result = turnout("resize", run.folder, "--to", "world=2,ep=2", "--step", 4, "--output", new)
    assert result.exit_code == 0, (result.output, result.exception)
    assert _contents(run.folder) == before
    assert folders.steps(new) == [4]
    assert _hashes(folders.step_folder(new, 4)) == _hashes(folders.step_folder(run.folder, 4))
    assert (new / "metrics.jsonl").read_text() == '{"step": 6}\n'
    recipe = load(RunConfig, new / "recipe.yaml")
    assert recipe.folder == new
    assert recipe.train.steps == 50
    manifest = identity.check(recipe, "data")
    assert manifest is not None
    assert manifest.layout == Layout(2, 2, 1, 2)
    assert SavedModel.open(new).run.folder == new
    _refused(turnout("resize", run.folder, "--to", "world=2", "--output", new), "is there already")
    assert _names(tmp_path) == ["new", "run"]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("world=3", ["global_batch_size is 8", "3 ranks"]),
        ("world=2,ep=4", ["expert_parallel_size is 4", "2 ranks"]),
        ("ep=3", ["expert_parallel_size is 3", "num_experts is 8"]),
        ("world=4,micro=4", ["4 ranks x train.micro_batch_size 4 = 16"]),
        ("zero=9", ["parallel.zero_stage is 9"]),
        ("world=0", ["there must be a rank"]),
        ("world", ["'world' is no part of a layout", "world=2,ep=2"]),
        ("ep=two", ["'ep=two' is no part"]),
        ("gpus=2", ["'gpus=2' is no part", "world, ep, zero, micro"]),
        ("ep=1,ep=2", ["at most once"]),
    ],
)
def test_a_layout_that_cannot_be_is_refused_and_nothing_changes(
    wanted: str, words: list[str], run: RunConfig
) -> None:
    before = _contents(run.folder)
    _refused(turnout("resize", run.folder, "--to", wanted), *words)
    assert _contents(run.folder) == before


def test_a_micro_batch_that_counts_is_not_changed(run: RunConfig) -> None:
    folder = folders.step_folder(run.folder, 6)
    limited = load(RunConfig, folder / "recipe.yaml", ["balance.capacity_factor=1.5"])
    (run.folder / "recipe.yaml").write_text(dump(limited))
    snapshot = Snapshot(8, 8000, "data", _state(run, 8), {})
    write(limited, snapshot, Ranks())
    _refused(turnout("resize", run.folder, "--to", "world=8"), "train.micro_batch_size was 2 and is 1")
    assert turnout("resize", run.folder, "--to", "world=4,ep=4").exit_code == 0


@pytest.mark.parametrize("moment", range(6))
def test_a_resize_that_is_killed_loses_nothing(
    moment: int, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended before each rename and each removal: the checkpoint, old or new, is whole, or said where it is."""
    folder = folders.step_folder(run.folder, 6)
    hashes = _hashes(folder)
    left = [moment]

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(resize, "seal", dying(resize.seal))
    monkeypatch.setattr(folders, "write_atomically", dying(folders.write_atomically))
    monkeypatch.setattr(retention, "sweep", dying(retention.sweep))
    with pytest.raises(KeyboardInterrupt):
        resize.resize(run.folder, {"world": 2, "ep": 2})
    monkeypatch.undo()
    before = folder.with_name(f".before-{folder.name}")
    if not folder.exists():
        with pytest.raises(CheckpointError, match=r"step_6, whole, .* Rename it to step_6"):
            folders.steps(run.folder)
        assert "torn" in turnout("list", run.folder).stdout
        before.rename(folder)
    assert folders.steps(run.folder) == [2, 4, 6]
    assert _hashes(folder) == hashes
    assert turnout("verify", run.folder).exit_code == 0
    assert turnout("resize", run.folder, "--to", "world=2,ep=2").exit_code == 0
    assert turnout("verify", run.folder).exit_code == 0
    assert _names(folder.parent) == ["step_2", "step_4", "step_6"]


def test_none_of_this_loads_deepspeed() -> None:
    names = ("listing", "read", "resize", "retention", "space", "tensors", "write")
    modules = ", ".join(["moe.checkpoints", *(f"moe.checkpoint.{name}" for name in names)])
    program = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert {"deepspeed", "transformers"} & set(done.stdout.split()) == set()
