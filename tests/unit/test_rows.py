"""What lies in a row: packed or end to end, documents apart or not, and that nothing is lost or seen twice."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe.data import index
from moe.data.batch import IGNORED
from moe.data.loader import validation_batches
from moe.data.packing import best_fit, pack
from moe.data.rows import PackedRows, Packing, open_rows
from moe.data.shards import TokenData
from moe.errors import DataError
from moe.evaluate import unigram_nats
from tests.unit.corpus import raw_data

LENGTH = 16


def _data(folder: Path, lengths: list[int], validation: list[int] | None = None) -> TokenData:
    """Each token's id is new, so that it tells where it comes from."""

    def documents(lengths: list[int]) -> list[list[int]]:
        ends = np.cumsum(lengths).tolist()
        return [list(range(end - n + 2, end + 2)) for n, end in zip(lengths, ends, strict=True)]

    splits: dict[Any, Any] = {"train": documents(lengths)}
    if validation:
        splits["validation"] = documents(validation)
    return raw_data(folder, splits, vocab_size=60_000, shard_tokens=37)


LENGTHS = st.lists(st.integers(0, 3 * LENGTH), min_size=1, max_size=40).filter(any)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@settings(max_examples=40, deadline=None, derandomize=True)
@example(lengths=[LENGTH], seed=0)
@example(lengths=[2 * LENGTH, 0, LENGTH + 1, 1, LENGTH - 1], seed=1)
@given(lengths=LENGTHS, seed=st.integers(0, 3))
def test_apart_every_token_is_in_one_row_and_predicts_the_next_of_its_document(
    tmp_path_factory: pytest.TempPathFactory, packing: Packing, lengths: list[int], seed: int
) -> None:
    data = _data(tmp_path_factory.getbasetemp() / "rows", lengths)
    ends = {int(end) + 1 for end in np.cumsum(lengths)}  # ids of last tokens
    document_of = {
        token + 2: number
        for number, length in enumerate(lengths)
        for token in range(sum(lengths[:number]), sum(lengths[:number]) + length)
    }
    seen: Counter[int] = Counter()
    rows = open_rows(data, "train", LENGTH, packing, apart=True, seed=seed)
    for number in range(len(rows)):
        row = rows[number]
        assert row.documents_S is not None
        ids, labels = row.ids_S.tolist(), row.labels_S.tolist()
        seen.update(ids[: row.filled])
        assert ids[row.filled :] == [1] * (LENGTH - row.filled)
        for at in range(row.filled):
            assert labels[at] == (IGNORED if ids[at] in ends else ids[at] + 1)
            if at + 1 < LENGTH:
                together = at + 1 < row.filled and document_of[ids[at]] == document_of[ids[at + 1]]
                assert (row.documents_S[at] == row.documents_S[at + 1]) == together
    assert seen == Counter(range(2, sum(lengths) + 2))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=LENGTHS, seed=st.integers(0, 3))
def test_packing_cuts_no_document_that_fits(lengths: list[int], seed: int) -> None:
    pieces = pack(np.array(lengths), LENGTH, seed)
    sums = np.add.reduceat(pieces.length_P, pieces.row_R1[:-1])
    assert sums.max() <= LENGTH
    assert (np.diff(pieces.row_R1) > 0).all()
    found = sorted(zip(pieces.start_P.tolist(), pieces.length_P.tolist(), strict=True))
    expected = []
    for end, length in zip(np.cumsum(lengths).tolist(), lengths, strict=True):
        starts = range(end - length, end, LENGTH)
        expected += [(start, min(LENGTH, end - start)) for start in starts]
    assert found == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=60), capacity=st.integers(12, 20))
def test_packing_is_best_fit_decreasing(sizes: list[int], capacity: int) -> None:
    """Against the definition, one piece after the other."""
    ordered = sorted(sizes, reverse=True)
    room: list[int] = []
    for size in ordered:
        fitting = [(left, number) for number, left in enumerate(room) if left >= size]
        if fitting:
            room[min(fitting)[1]] -= size
        else:
            room.append(capacity - size)
    bins, number = best_fit(np.array(ordered), capacity)
    left = capacity - np.bincount(bins, weights=ordered, minlength=number).astype(int)
    assert sorted(left.tolist()) == sorted(room)


def test_packing_like_text_leaves_next_to_no_padding_and_takes_no_time() -> None:
    lengths = np.random.default_rng(0).lognormal(6.3, 1.2, 300_000).clip(1, 200_000).astype(np.int64)
    began = time.process_time()
    pieces = pack(lengths, 4096, 0)
    seconds = time.process_time() - began
    assert 1 - lengths.sum() / (pieces.num_rows * 4096) < 0.001
    assert len(lengths) / seconds > 200_000


def test_rows_follow_from_tokens_length_and_seed_alone() -> None:
    lengths = np.random.default_rng(1).integers(1, 200, 5000)
    one, same, other = (pack(lengths, 256, seed) for seed in (3, 3, 4))
    assert np.array_equal(one.start_P, same.start_P)
    assert np.array_equal(one.row_R1, same.row_R1)
    assert not np.array_equal(one.start_P, other.start_P)


def test_the_index_file_is_used_again_and_made_again_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _data(tmp_path / "d", [5, 30, 7, 16, 2, 9])
    first = open_rows(data, "train", LENGTH, "best_fit", apart=True, seed=0)
    (path,) = (tmp_path / "d" / ".packing").iterdir()
    before = path.read_bytes()

    def rows() -> list[list[int]]:
        opened = open_rows(data, "train", LENGTH, "best_fit", apart=True, seed=0)
        return [opened[number].ids_S.tolist() for number in range(len(opened))]

    expected = [first[number].ids_S.tolist() for number in range(len(first))]
    with monkeypatch.context() as patch:
        patch.setattr(index, "pack", lambda *_: pytest.fail("it was there"))
        assert rows() == expected
    for at in (0, 9, 30, len(before) - 1):
        path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        assert rows() == expected
        assert path.read_bytes() == before
    for kept in (0, 20, len(before) - 4):
        path.write_bytes(before[:kept])
        assert rows() == expected
    open_rows(data, "train", LENGTH, "best_fit", apart=True, seed=1)
    open_rows(data, "train", LENGTH - 1, "best_fit", apart=True, seed=0)
    assert len(list(path.parent.iterdir())) == 3


def test_a_folder_that_cannot_be_written_is_packed_without_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _data(tmp_path / "d", [5, 30, 7, 16, 2, 9])
    (tmp_path / "d" / ".packing").write_text("in the way")
    assert len(open_rows(data, "train", LENGTH, "best_fit", apart=True, seed=0)) == 5


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 1, 23])
def test_validation_predicts_what_each_document_holds_once_over_ranks(
    tmp_path: Path, packing: Packing, apart: bool, max_tokens: int | None
) -> None:
    lengths = [20, 5, 40, 9, 1, 16]
    data = _data(tmp_path / "d", [30], lengths)
    found: list[tuple[int, int]] = []
    for rank in range(2):
        for batch in validation_batches(
            data,
            sequence_length=LENGTH,
            batch_size=2,
            rank=rank,
            world_size=2,
            max_tokens=max_tokens,
            packing=packing,
            attend_across_documents=not apart,
        ):
            here = batch.predicted()
            found += zip(batch.input_ids_BS[here].tolist(), batch.labels_BS[here].tolist(), strict=True)
    if max_tokens is not None:
        assert len(found) == max_tokens
        return
    ends = {int(end) + 1 for end in np.cumsum(lengths)}
    inside = sorted((token, token + 1) for token in range(2, sum(lengths) + 2) if token not in ends)
    if apart:
        assert sorted(found) == inside
        assert unigram_nats(data, apart=True) < unigram_nats(data)
    else:
        assert set(inside) <= set(found)
        assert len(found) == len(set(found))


@pytest.mark.parametrize("apart", [False, True])
def test_packed_rows_read_together_are_those_read_alone(tmp_path: Path, apart: bool) -> None:
    lengths = [5, 30, 7, 16, 2, 9, 40, 0, 3]
    rows = open_rows(_data(tmp_path / "d", lengths), "train", LENGTH, "best_fit", apart=apart, seed=0)
    assert isinstance(rows, PackedRows)
    order = [*range(len(rows)), 0, 2, 1]
    block = rows.block(order)
    for at, number in enumerate(order):
        alone, together = rows[number], block[at]
        assert alone.ids_S.tolist() == together.ids_S.tolist()
        assert alone.labels_S.tolist() == together.labels_S.tolist()
        assert (alone.filled, alone.lengths) == (together.filled, together.lengths)


def test_packed_rows_that_see_across_documents_predict_across_them(tmp_path: Path) -> None:
    rows = open_rows(_data(tmp_path / "d", [10, 6, 20]), "train", LENGTH, "best_fit", apart=False, seed=0)
    found = {row.ids_S[0]: row for row in map(rows.__getitem__, range(len(rows)))}
    assert all(row.documents_S is None for row in found.values())
    assert found[2].ids_S.tolist() == list(range(2, 18))
    assert found[2].labels_S.tolist() == [*range(3, 18), IGNORED]
    assert found[18].labels_S.tolist() == list(range(19, 35))  # goes on in another row


def test_packed_conversations_that_see_one_another_are_refused(tmp_path: Path) -> None:
    data = _data(tmp_path / "d", [10, 6])
    chat = type("Chat", (TokenData,), {"is_chat": True})(data.folder, data.manifest)
    with pytest.raises(DataError, match="attend_across_documents is true, but documents are conversations"):
        open_rows(chat, "train", LENGTH, "best_fit", apart=False, seed=0)
