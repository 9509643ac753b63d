"""The order of samples, and what a batch holds."""

import itertools
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.data.loader import Batch, train_batches, validation_batches
from moe.data.shards import TokenData
from moe.errors import DataError
from tests.harness import run_ranks
from tests.unit.corpus import raw_data

LENGTH = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    """23 samples of tokens 0, 1, 2...: a sample's first token tells which it is."""
    ids = list(range(23 * LENGTH + 1))
    documents = [ids[at : at + 7] for at in range(0, len(ids), 7)]
    return raw_data(
        tmp_path_factory.mktemp("loader") / "data",
        {"train": documents, "validation": [list(range(2, 13))]},
        vocab_size=500,
        shard_tokens=20,
    )


def _steps(data: TokenData, steps: int, *, start_step: int = 0, **changes: int) -> list[tuple[Batch, ...]]:
    settings = {
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "rank": 0,
        "world_size": 1,
        "seed": 5,
    } | changes
    batches = train_batches(data, sequence_length=LENGTH, start_step=start_step, **settings)
    return list(itertools.islice(batches, steps))


def _rows(steps: list[tuple[Batch, ...]]) -> list[list[list[int]]]:
    """By step, the input rows in order."""
    return [[row for batch in step for row in batch.input_ids_BS.tolist()] for step in steps]


def _order(steps: list[tuple[Batch, ...]]) -> list[int]:
    return [row[0] // LENGTH for rows in _rows(steps) for row in rows]


def test_a_batch_is_tokens_and_what_comes_after_them(data: TokenData) -> None:
    (step,) = _steps(data, 1)
    assert len(step) == 4
    for batch in step:
        assert batch.input_ids_BS.shape == batch.labels_BS.shape == batch.mask_BS.shape == (2, LENGTH)
        assert batch.input_ids_BS.dtype == batch.labels_BS.dtype == torch.int64
        assert batch.mask_BS.dtype == torch.bool
        assert batch.mask_BS.all()
        assert batch.num_predictions == 2 * LENGTH
        assert torch.equal(batch.labels_BS, batch.input_ids_BS + 1)
        assert (batch.input_ids_BS[:, 0] % LENGTH == 0).all()


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_steps_are_the_same_for_every_layout(data: TokenData, world_size: int, micro_batch_size: int) -> None:
    alone = _rows(_steps(data, 7, micro_batch_size=8))
    layout = {"world_size": world_size, "micro_batch_size": micro_batch_size}
    ranks = [_rows(_steps(data, 7, rank=rank, **layout)) for rank in range(world_size)]
    assert [list(itertools.chain(*step)) for step in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_positions_make_up_the_rows(data: TokenData, parts: int) -> None:
    """Of training and of validation, whose last row is short: ids, labels and what counts."""
    size = LENGTH // parts
    positions = [slice(part * size, (part + 1) * size) for part in range(parts)]

    def batches(here: slice) -> list[Batch]:
        train = train_batches(
            data,
            sequence_length=LENGTH,
            global_batch_size=8,
            micro_batch_size=2,
            rank=1,
            world_size=2,
            seed=5,
            start_step=3,
            positions=here,
        )
        held_out = validation_batches(
            data, sequence_length=LENGTH, batch_size=2, rank=0, world_size=1, positions=here
        )
        return [*next(train), *held_out]

    whole, *cut = [batches(here) for here in (slice(None), *positions)]
    assert not whole[-1].mask_BS.all()
    for row, *pieces in zip(whole, *cut, strict=True):
        assert all(piece.mask_BS.shape == (2, size) for piece in pieces)
        for name in ("input_ids_BS", "labels_BS", "mask_BS"):
            parts = [getattr(piece, name) for piece in pieces]
            assert torch.equal(torch.cat(parts, dim=1), getattr(row, name))


@pytest.mark.parametrize("global_batch_size", [1, 5, 46])
def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order(
    data: TokenData, global_batch_size: int
) -> None:
    steps = _steps(
        data,
        -(-69 // global_batch_size),
        global_batch_size=global_batch_size,
        micro_batch_size=global_batch_size,
    )
    order = _order(steps)
    epochs = [order[0:23], order[23:46], order[46:69]]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_what_is_left_at_the_end_is_a_short_row_of_the_epoch(tmp_path: Path) -> None:
    data = raw_data(tmp_path / "d", {"train": [list(range(2, 2 + 2 * LENGTH + 3))]}, vocab_size=500)
    ((batch,),) = _steps(data, 1, global_batch_size=3, micro_batch_size=3)
    assert sorted(batch.labels_BS[batch.mask_BS].tolist()) == list(range(3, 2 + 2 * LENGTH + 3))
    assert sorted(batch.mask_BS.sum(1).tolist()) == [2, LENGTH, LENGTH]


def test_a_resumed_run_sees_what_the_uninterrupted_one_does(data: TokenData) -> None:
    whole = _rows(_steps(data, 12))
    for start in (1, 3, 11):
        assert _rows(_steps(data, 12 - start, start_step=start)) == whole[start:]


def test_a_far_step_is_there_at_once(data: TokenData) -> None:
    _steps(data, 1)
    began = time.process_time()
    assert len(_steps(data, 2, start_step=10**12)) == 2
    assert time.process_time() - began < 1.0


def test_the_seed_decides_the_order(data: TokenData) -> None:
    assert _order(_steps(data, 8)) == _order(_steps(data, 8))
    first, second = (
        _order(_steps(data, 46, seed=seed, global_batch_size=1, micro_batch_size=1)) for seed in (5, 6)
    )
    assert first[:23] != second[:23]
    assert first[23:] != second[:23]  # nor is a seed another one, an epoch later
    assert _order(_steps(data, 1, seed=2**40)) != _order(_steps(data, 1, seed=2**40 + 2**32))


def test_one_sample_is_an_epoch(tmp_path: Path) -> None:
    data = raw_data(tmp_path / "d", {"train": [[2, 3, 4, 5, 6]]}, vocab_size=500)
    assert _rows(_steps(data, 1, global_batch_size=2, micro_batch_size=1)) == [[[2, 3, 4, 5]] * 2]


def test_a_split_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    data = raw_data(tmp_path / "d", {"train": [[2, 3, 4, 5]]}, vocab_size=500)
    with pytest.raises(DataError, match="the training split has 4 tokens: a sequence of 4 needs 5"):
        _steps(data, 1)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_ids_outside_the_vocabulary_end_the_batches_with_a_message(tmp_path: Path, split: str) -> None:
    ids = [list(range(2, 20))]
    raw_data(tmp_path / "d", {"train": ids, "validation": ids}, vocab_size=500)
    (tmp_path / "d" / f"{split}-00000.bin").write_bytes(b"\xff" * 2 * 18)
    data = TokenData.open(tmp_path / "d", verify=False)
    batches: Iterator[Any] = validation_batches(
        data, sequence_length=LENGTH, batch_size=2, rank=0, world_size=1
    )
    if split == "train":
        batches = iter(_steps(data, 1) for _ in range(1))
    with pytest.raises(DataError, match=rf"d: token \d+ of the {split} split has id 65535"):
        next(batches)


def test_closing_the_iterator_ends_its_thread(data: TokenData) -> None:
    def readers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")}

    before = readers()
    batches: Any = train_batches(
        data,
        sequence_length=LENGTH,
        global_batch_size=8,
        micro_batch_size=8,
        rank=0,
        world_size=1,
        seed=0,
        start_step=0,
    )
    next(batches)
    mine = readers() - before
    assert len(mine) == 1
    batches.close()
    for thread in mine:
        thread.join(timeout=120)
        assert not thread.is_alive()


def _predictions(batches: list[Batch]) -> list[tuple[int, int]]:
    return [
        pair
        for batch in batches
        for pair in zip(
            batch.input_ids_BS[batch.mask_BS].tolist(), batch.labels_BS[batch.mask_BS].tolist(), strict=True
        )
    ]


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(0, 40),
    sequence_length=st.integers(1, 9),
    batch_size=st.integers(1, 3),
    world_size=st.integers(1, 4),
    max_tokens=st.none() | st.integers(0, 45),
)
def test_validation_counts_each_prediction_once_over_all_ranks(
    tmp_path_factory: pytest.TempPathFactory,
    num_tokens: int,
    sequence_length: int,
    batch_size: int,
    world_size: int,
    max_tokens: int | None,
) -> None:
    ids = list(range(2, num_tokens + 2))
    folder = tmp_path_factory.getbasetemp() / "validation"
    data = raw_data(folder, {"train": [[2, 3]], "validation": [ids] if ids else []}, vocab_size=500)
    ranks = [
        list(
            validation_batches(
                data,
                sequence_length=sequence_length,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                max_tokens=max_tokens,
            )
        )
        for rank in range(world_size)
    ]
    expected = list(itertools.pairwise(ids))[:max_tokens]
    assert sorted(itertools.chain(*map(_predictions, ranks))) == expected
    assert len({len(batches) for batches in ranks}) == 1
    assert all(
        batch.input_ids_BS.shape == (batch_size, sequence_length) for batches in ranks for batch in batches
    )
    assert len(ranks[0]) == -(-len(expected) // (sequence_length * batch_size * world_size))


def test_the_last_validation_row_is_filled_with_pad(data: TokenData) -> None:
    (batch,) = validation_batches(data, sequence_length=8, batch_size=3, rank=0, world_size=1)
    assert batch.input_ids_BS.tolist() == [[*range(2, 10)], [10, 11, 12, 1, 1, 1, 1, 1], [1] * 8]
    assert batch.labels_BS.tolist() == [[*range(3, 11)], [11, 12, 1, 1, 1, 1, 1, 1], [1] * 8]
    assert batch.mask_BS.sum(1).tolist() == [8, 2, 0]


def _a_rank_reads(rank: int, data: TokenData) -> None:
    (step,) = _steps(data, 1, rank=rank, world_size=2)
    mine = torch.cat([batch.input_ids_BS for batch in step])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.cat(both).tolist() == _rows(_steps(data, 1))[0]


def test_forked_ranks_read_their_shares(tmp_path: Path, data: TokenData) -> None:
    _steps(data, 1)  # threads of the parent must not matter to its forks
    run_ranks(_a_rank_reads, 2, tmp_path, data)


FRESH = """
import pickle, sys
from moe.data import loader
assert "grain" not in sys.modules
data = pickle.load(sys.stdin.buffer)
batches = loader.train_batches(data, sequence_length=4, global_batch_size=8, micro_batch_size=2, rank=0,
                               world_size=1, seed=5, start_step=0)
print([row for batch in next(batches) for row in batch.input_ids_BS.tolist()])
assert not {"jax", "tensorflow", "deepspeed", "transformers"} & set(sys.modules)
"""


def test_a_fresh_process_reads_the_same_and_ends_with_the_iterator_open(data: TokenData) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FRESH], input=pickle.dumps(data), capture_output=True, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.decode().strip() == str(_rows(_steps(data, 1))[0])
