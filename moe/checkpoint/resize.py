"""A checkpoint -> the same tensors as the parts that the ranks of another layout write; needs no engine."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from moe.checkpoint import folder as folders
from moe.checkpoint import identity, retention, tensors
from moe.checkpoint.folder import Layout, Manifest
from moe.checkpoint.keys import Key, writer
from moe.checkpoint.lock import held
from moe.checkpoint.read import SavedModel, chosen
from moe.checkpoint.write import Part, begin, filled, seal, sync, write_part
from moe.config import RunConfig, check_world
from moe.errors import CheckpointError
from moe.model import Transformer
from moe.model.lora import adapt
from moe.recipe import dump, load, parse


@dataclass(frozen=True)
class Resized:
    """A checkpoint in its new layout, in its place."""

    folder: Path
    before: Layout
    after: Layout
    num_tensors: int


def resize(
    run_folder: Path, wanted: dict[str, int], step: int | None = None, output: Path | None = None
) -> Resized:
    """Rewrite the newest checkpoint, or that of `step`, for the layout `wanted` (world, ep, zero, micro).

    It takes the old one's place after it has been read back and every tensor has the hash that it
    had; with `output` it goes into a new run folder, and the old one stays as it is. Raises `ConfigError` for a
    layout that cannot be, `CheckpointError` for whatever cannot be trusted.
    """
    step = chosen(run_folder, step)
    if output is None:
        with held(run_folder):
            saved = SavedModel.open(run_folder, step)
            run, world = _target(saved, wanted)
            folder = _rewrite(saved, run, world, run_folder)
            _swap(folder)
            folders.write_atomically(run_folder / "recipe.yaml", dump(_like(run, run_folder, saved.run)))
    else:
        saved = SavedModel.open(run_folder, step)
        run, world = _target(saved, wanted)
        with _new_folder(output) as partial:
            run = run.model_copy(update={"run_dir": str(output)})
            folder = _rewrite(saved, run, world, partial)
            folders.torn(folder).rename(folder)
            folders.write_atomically(partial / "recipe.yaml", dump(_like(run, run_folder, saved.run)))
            _copy_rest(run_folder, partial)
        folder = folders.step_folder(output, step)
    manifest = folders.read_manifest(folder)
    return Resized(folder, saved.manifest.layout, manifest.layout, len(manifest.tensors))


def _target(saved: SavedModel, wanted: dict[str, int]) -> tuple[RunConfig, int]:
    """The recipe and the number of ranks to write for, once the layout can be and all tensors are as written."""
    world = wanted.get("world", saved.manifest.layout.world_size)
    run = _recipe(saved.run, wanted, world)
    check_world(run, world)
    identity.compare(saved.run, run)
    tensors.verify(saved.folder, saved.manifest)
    return run, world


def _like(run: RunConfig, run_folder: Path, saved: RunConfig) -> RunConfig:
    """The run folder's own recipe, which may be newer than the checkpoint's, in the layout of `run`."""
    path = run_folder / "recipe.yaml"
    newest = load(RunConfig, path) if path.is_file() else saved
    train = newest.train.model_copy(update={"micro_batch_size": run.train.micro_batch_size})
    return newest.model_copy(update={"run_dir": run.run_dir, "parallel": run.parallel, "train": train})


def _recipe(run: RunConfig, wanted: dict[str, int], world: int) -> RunConfig:
    """With the new parallel section, and the largest micro-batch up to the old one that fits it."""
    train = run.train
    micro = wanted.get("micro", train.micro_batch_size)
    share = train.global_batch_size // world
    if "micro" not in wanted and train.global_batch_size % world == 0 and share % micro:
        micro = max(size for size in range(1, micro + 1) if share % size == 0)
    changes = {
        "parallel.expert_parallel_size": wanted.get("ep", run.parallel.expert_parallel_size),
        "parallel.zero_stage": wanted.get("zero", run.parallel.zero_stage),
        "train.micro_batch_size": micro,
    }
    overrides = [f"{key}={value}" for key, value in changes.items()]
    return parse(RunConfig, dump(run), overrides, source="the new layout")


def _rewrite(saved: SavedModel, run: RunConfig, world: int, home: Path) -> Path:
    """Write, and read back, the parts of all ranks under the torn name of the folder that is returned."""
    target = folders.step_folder(home, saved.step)
    torn = folders.torn(target)
    begin(torn)
    shares = _shares(saved, run, world)
    same_ranks = world == saved.manifest.layout.world_size
    parts: list[Part] = []
    with tensors.Reader(saved.folder, saved.manifest) as reader:
        for rank, keys in enumerate(shares):
            rng = _rng(saved, rank) if same_ranks else {}  # another number of ranks has other streams
            parts.append(write_part(torn, rank, {key: reader.get(key) for key in keys}, rng))
    manifest = filled(replace(saved.manifest, layout=Layout.of(run, world)), run, parts)
    _compare(saved.manifest, manifest, torn)
    seal(run, manifest, torn)
    return target


def _shares(saved: SavedModel, run: RunConfig, world: int) -> list[list[str]]:
    """The keys that each rank would write, in its order: parameter by parameter, weight before moments."""
    with torch.device("meta"):
        order = [name for name, _ in adapt(Transformer(run.model), run.lora).named_parameters()]
    experts = run.model.moe.num_experts if run.model.moe else 1
    ep = run.parallel.expert_parallel_size

    def place(text: str) -> tuple[int, bool, str, int]:
        key = Key.parse(text)
        turn = order.index(key.parameter) if key.parameter in order else len(order)
        return turn + (not key.parameter), key.state != "weight", key.state, key.expert or 0

    shares: list[list[str]] = [[] for _ in range(world)]
    for text in sorted(saved.manifest.tensors, key=place):
        shares[writer(Key.parse(text), order, experts, world, ep)].append(text)
    return shares


def _rng(saved: SavedModel, rank: int) -> dict[str, Tensor]:
    name = f"rng-{rank:05d}.safetensors"
    return load_file(saved.folder / name) if name in saved.manifest.files else {}


def _compare(before: Manifest, after: Manifest, torn: Path) -> None:
    """What is on the disk now has the hashes that were on the disk before."""
    folders.verify(torn, replace(after, files={k: v for k, v in after.files.items() if k != "recipe.yaml"}))
    count = tensors.verify(torn, after)
    known = {key: saved.xxh3 for key, saved in before.tensors.items() if saved.xxh3 is not None}
    differing = [key for key, xxh3 in known.items() if after.tensors[key].xxh3 != xxh3]
    if differing or count != len(before.tensors) or before.tensors.keys() != after.tensors.keys():
        raise CheckpointError(
            f"{torn}: {count} tensors were written for {len(before.tensors)}, and {differing[:1] or 'none'} differs "
            f"from its hash. The checkpoint is as it was; look at the disk before you try again."
        )


def _swap(target: Path) -> None:
    """Both are whole: at every moment one of them has the name, or `folder.steps` says which to rename."""
    before = target.with_name(f"{folders.BEFORE}{target.name}")
    shutil.rmtree(before, ignore_errors=True)
    target.rename(before)
    folders.torn(target).rename(target)
    sync(target.parent)
    retention.sweep(target.parent)


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder that gets the name `output` when it is whole, and is gone if that fails."""
    if output.exists():
        raise CheckpointError(
            f"{output} is there already: nothing is overwritten. Give a folder that is not."
        )
    partial = output.with_name(f"{folders.TORN}{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(output)
        sync(output.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_rest(run_folder: Path, partial: Path) -> None:
    """What a run's folder holds beside checkpoints and recipe, so that the new one goes on by itself."""
    if (run_folder / "tokenizer").is_dir():
        shutil.copytree(run_folder / "tokenizer", partial / "tokenizer")
    if (run_folder / "metrics.jsonl").is_file():
        shutil.copyfile(run_folder / "metrics.jsonl", partial / "metrics.jsonl")
