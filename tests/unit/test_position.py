"""Each sample once an epoch, wherever a run is cut and in whatever layout it goes on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import recipe
from moe.checkpoint import folder as folders
from moe.checkpoint import identity
from moe.checkpoint.save import TrainState
from moe.config import RunConfig
from moe.data.loader import train_batches
from moe.data.shards import TokenData
from moe.errors import CheckpointError
from tests.unit.corpus import raw_data

LENGTH, MOST = 2, 13


@dataclass(frozen=True)
class Stretch:
    """Steps that a run takes before it is cut."""

    steps: int
    world_size: int
    micro_batch_size: int


@st.composite
def cut_runs(draw: st.DrawFn) -> tuple[int, int, list[Stretch]]:
    """Samples in the split, the global batch, and a run over at least two epochs and one batch."""
    samples, batch = draw(st.integers(1, MOST)), draw(st.sampled_from([1, 4, 6, 7, 8, 12]))
    left, stretches = -(-2 * samples // batch) + 1, []
    while left > 0:
        world_size = draw(st.sampled_from([n for n in (1, 2, 3, 4) if batch % n == 0]))
        local = batch // world_size
        micro = draw(st.sampled_from([n for n in range(1, local + 1) if local % n == 0]))
        steps = draw(st.integers(1, left)) if len(stretches) < 3 else left
        stretches.append(Stretch(steps, world_size, micro))
        left -= stretches[-1].steps
    return samples, batch, stretches


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[int, TokenData]:
    """By number of samples: the first token of each tells which it is."""
    folder = tmp_path_factory.mktemp("splits")
    ids = range(MOST * LENGTH + 1)
    return {
        n: raw_data(folder / str(n), {"train": [list(ids[: n * LENGTH + 1])]}, vocab_size=100)
        for n in range(1, MOST + 1)
    }


def _seen(data: TokenData, batch: int, stretches: list[Stretch], seed: int) -> list[int]:
    """The samples in the order in which the run sees them: step after step, rank after rank."""
    seen, state = [], TrainState()
    for stretch in stretches:
        ranks = [
            train_batches(
                data,
                sequence_length=LENGTH,
                global_batch_size=batch,
                micro_batch_size=stretch.micro_batch_size,
                rank=rank,
                world_size=stretch.world_size,
                seed=seed,
                start_step=state.step,
            )
            for rank in range(stretch.world_size)
        ]
        for _ in range(stretch.steps):
            step = [next(batches) for batches in ranks]
            assert {len(here) for here in step} == {batch // stretch.world_size // stretch.micro_batch_size}
            rows = [row for here in step for micro in here for row in micro.input_ids_BS.tolist()]
            seen += [row[0] // LENGTH for row in rows]
            state = state.after(batch * LENGTH)
        for batches in ranks:
            batches.close()  # type: ignore[attr-defined]  # a generator; its reader ends with it
    return seen


@settings(max_examples=12, deadline=None)
@given(run=cut_runs(), seed=st.integers(0, 2**40))
def test_each_sample_comes_once_an_epoch_however_the_run_is_cut(
    run: tuple[int, int, list[Stretch]], seed: int, splits: dict[int, TokenData]
) -> None:
    samples, batch, stretches = run
    seen = _seen(splits[samples], batch, stretches, seed)
    assert len(seen) == batch * sum(stretch.steps for stretch in stretches) >= 2 * samples
    epochs = [seen[at : at + samples] for at in range(0, len(seen), samples)]
    assert all(sorted(epoch) == list(range(samples)) for epoch in epochs[:-1])
    assert len(set(epochs[-1])) == len(epochs[-1])  # the last one is not over
    whole = [Stretch(sum(stretch.steps for stretch in stretches), 1, batch)]
    assert seen == _seen(splits[samples], batch, whole, seed)


def _saved(page: dict[str, Any], folder: Path, next_sample: int) -> RunConfig:
    """A run of 4 steps of 8 sequences with a checkpoint that says which sample comes next."""
    run = recipe.parse(RunConfig, recipe.yaml.safe_dump(page), [f"run_dir={folder}"], source="recipe.yaml")
    step = folders.step_folder(folder, 4)
    step.mkdir(parents=True)
    (step / "recipe.yaml").write_text(recipe.dump(run))
    file = folders.File((step / "recipe.yaml").stat().st_size, folders.hash_file(step / "recipe.yaml"))
    layout = folders.Layout.of(run, 1)
    manifest = folders.Manifest(4, next_sample, 1024, layout, "data", {"recipe.yaml": file}, {})
    folders.write_manifest(step, manifest)
    return run


def test_a_checkpoint_whose_next_sample_is_not_that_of_its_step_is_refused(
    tiny_page: dict[str, Any], tmp_path: Path
) -> None:
    right = identity.check(_saved(tiny_page, tmp_path / "right", 32), "data")
    assert right is not None
    assert right.next_sample == 32
    with pytest.raises(CheckpointError, match=r"sample 31 comes next, but after 4 steps of 8 .* sample 32"):
        identity.check(_saved(tiny_page, tmp_path / "wrong", 31), "data")


@pytest.mark.parametrize("change", ["train.global_batch_size=16", "data.sequence_length=16", "seed=8"])
def test_what_would_give_a_position_another_meaning_is_refused(
    change: str, tiny_page: dict[str, Any], tmp_path: Path
) -> None:
    run = _saved(tiny_page, tmp_path / "run", 32)
    other = recipe.parse(RunConfig, recipe.dump(run), [change], source="recipe.yaml")
    with pytest.raises(CheckpointError, match=rf"{change.partition('=')[0]} was .* and is"):
        identity.check(other, "data")
    with pytest.raises(CheckpointError, match="the position would mean other samples"):
        identity.check(run, "other data")
