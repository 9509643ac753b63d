"""Megatron pairs and the flat view of tokens over them."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.data.shards import FileStamp, Index, PairWriter, TokenData, token_dtype
from moe.errors import DataError
from tests.unit.corpus import raw_data

# Written by hand from Megatron-LM's megatron/core/datasets/indexed_dataset.py (_IndexWriter).
GOLDEN_UINT16 = bytes.fromhex(
    "4d4d4944494458 0000"  # MMIDIDX\0\0
    "0100000000000000"  # version 1
    "08"  # uint16
    "0200000000000000"  # two sequences
    "0300000000000000"  # two documents, and one
    "03000000 01000000"  # lengths
    "0000000000000000 0600000000000000"  # offsets in bytes
    "0000000000000000 0100000000000000 0200000000000000"  # first sequences of documents, and the end
)
GOLDEN_INT32 = bytes.fromhex(
    "4d4d4944494458 0000 0100000000000000 04 0100000000000000 0200000000000000"
    "02000000 0000000000000000 0000000000000000 0100000000000000"
)

DOCUMENTS = st.lists(st.lists(st.integers(0, 499), min_size=1, max_size=12), min_size=1, max_size=20)


def _write(prefix: Path, documents: list[list[int]], dtype: str) -> tuple[FileStamp, FileStamp]:
    writer = PairWriter(prefix, dtype)
    for ids in documents:
        writer.add(ids)
    return writer.close()


def test_files_are_megatrons_to_the_byte(tmp_path: Path) -> None:
    _write(tmp_path / "small", [[1, 2, 259], [4]], "uint16")
    assert (tmp_path / "small.bin").read_bytes() == bytes.fromhex("0100 0200 0301 0400")
    assert (tmp_path / "small.idx").read_bytes() == GOLDEN_UINT16
    _write(tmp_path / "large", [[70000, 5]], "int32")
    assert (tmp_path / "large.bin").read_bytes() == bytes.fromhex("70110100 05000000")
    assert (tmp_path / "large.idx").read_bytes() == GOLDEN_INT32


def test_stamps_are_those_of_the_files(tmp_path: Path) -> None:
    stamps = _write(tmp_path / "a", [[1, 2], [3]], "uint16")
    assert stamps == (FileStamp.of(tmp_path / "a.bin"), FileStamp.of(tmp_path / "a.idx"))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(259, "uint16"), (65499, "uint16"), (65500, "int32"), (200_000, "int32")]
)
def test_token_type_is_megatrons_choice(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype


def test_ids_that_do_not_fit_are_refused_not_wrapped(tmp_path: Path) -> None:
    with pytest.raises(OverflowError):
        PairWriter(tmp_path / "a", "uint16").add([65536])


def test_several_sequences_to_a_document_can_be_read(tmp_path: Path) -> None:
    _write(tmp_path / "a", [[1, 2, 3], [4]], "uint16")
    path = tmp_path / "a.idx"
    one_document = bytearray(GOLDEN_UINT16[:-8])
    one_document[26] = 2
    one_document[-8] = 2
    path.write_bytes(bytes(one_document))
    index = Index.read(path)
    index.check(path)
    assert index.documents_D.tolist() == [0, 2]
    assert index.num_bytes == 8


@settings(max_examples=40, deadline=None)
@given(
    documents=DOCUMENTS,
    shard_tokens=st.integers(1, 60),
    vocab_size=st.sampled_from([500, 70_000]),
    rest=st.data(),
)
def test_tokens_are_the_documents_end_to_end_whatever_the_shards(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    shard_tokens: int,
    vocab_size: int,
    rest: st.DataObject,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flat"
    data = raw_data(folder, {"train": documents}, vocab_size=vocab_size, shard_tokens=shard_tokens)
    flat = [token for ids in documents for token in ids]
    start = rest.draw(st.integers(0, len(flat)))
    stop = rest.draw(st.integers(start, len(flat)))
    assert data.num_tokens("train") == len(flat)
    assert data.num_documents("train") == len(documents)
    assert data.tokens("train", 0, len(flat)).tolist() == flat
    found = data.tokens("train", start, stop)
    assert found.dtype == np.dtype(token_dtype(vocab_size))
    assert found.tolist() == flat[start:stop]


def test_one_shard_is_read_without_a_copy(tmp_path: Path) -> None:
    data = raw_data(tmp_path / "d", {"train": [[2, 3, 4, 5], [6, 7]]}, vocab_size=500, shard_tokens=4)
    assert len(data.manifest.splits["train"].shards) == 2
    for start, stop in ((1, 3), (0, 4), (4, 6)):
        assert not data.tokens("train", start, stop).flags.owndata
    assert not data.tokens("train", 1, 3).flags.writeable
    assert data.tokens("train", 3, 5).tolist() == [5, 6]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 7)])
def test_tokens_outside_the_split_are_an_index_error(tmp_path: Path, start: int, stop: int) -> None:
    data = raw_data(tmp_path / "d", {"train": [[2, 3, 4, 5, 6, 7]]}, vocab_size=500)
    with pytest.raises(IndexError, match="which has 6 tokens"):
        data.tokens("train", start, stop)


def test_a_split_without_text_is_empty(tmp_path: Path) -> None:
    data = raw_data(tmp_path / "d", {"train": [[2, 3]]}, vocab_size=500)
    assert (data.num_tokens("validation"), data.num_bytes("validation")) == (0, 0)
    assert len(data.tokens("validation", 0, 0)) == 0


def test_the_fingerprint_follows_the_tokens_not_the_place(tmp_path: Path) -> None:
    data = raw_data(tmp_path / "a", {"train": [[2, 3], [4, 5]]}, vocab_size=500)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert TokenData.open(tmp_path / "b", verify=True).fingerprint == data.fingerprint
    other = raw_data(tmp_path / "c", {"train": [[2, 3], [4, 6]]}, vocab_size=500)
    cut_elsewhere = raw_data(tmp_path / "e", {"train": [[2, 3, 4], [5]]}, vocab_size=500)
    assert len({data.fingerprint, other.fingerprint, cut_elsewhere.fingerprint}) == 3


@pytest.mark.parametrize("change", [{"vocab_size": 501}, {"eos_id": 2}, {"pad_id": 0}])
def test_the_fingerprint_follows_the_special_tokens(tmp_path: Path, change: dict[str, int]) -> None:
    manifest = raw_data(tmp_path / "a", {"train": [[2, 3]]}, vocab_size=500).manifest
    tokenizer = manifest.tokenizer.model_copy(update=change)
    assert manifest.model_copy(update={"tokenizer": tokenizer}).fingerprint != manifest.fingerprint


@pytest.mark.parametrize("vocab_size", [500, 70_000])
def test_an_id_outside_the_vocabulary_is_refused_where_it_is_read(tmp_path: Path, vocab_size: int) -> None:
    data = raw_data(tmp_path / "a", {"train": [[2, 3], [4, 5, 6]]}, vocab_size=vocab_size, shard_tokens=2)
    itemsize = 2 if vocab_size == 500 else 4
    shard = tmp_path / "a" / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:itemsize] + b"\xff" * 2 * itemsize)
    data = TokenData.open(tmp_path / "a", verify=False)
    assert data.tokens("train", 0, 3).tolist() == [2, 3, 4]
    for start, stop in ((0, 5), (3, 4), (4, 5)):
        with pytest.raises(
            DataError, match=rf"a: token {max(start, 3)} of the train split has id (65535|-1)"
        ):
            data.tokens("train", start, stop)


def test_a_pickle_carries_the_path_not_the_tokens(tmp_path: Path) -> None:
    data = raw_data(tmp_path / "a", {"train": [list(range(400)) * 50]}, vocab_size=500)
    data.tokens("train", 0, 10)
    frozen = pickle.dumps(data)
    assert len(frozen) < 4000
    assert pickle.loads(frozen).tokens("train", 0, 20_000).tolist() == list(range(400)) * 50


def test_without_verify_sizes_and_indices_are_still_checked(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    raw_data(folder, {"train": [[2, 3], [4, 5]]}, vocab_size=500)
    shard = folder / "train-00000.bin"
    shard.write_bytes(b"\x09" + shard.read_bytes()[1:])
    TokenData.open(folder, verify=False)
    with pytest.raises(DataError, match=r"train-00000\.bin: its hash is"):
        TokenData.open(folder, verify=True)
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-00000\.bin: 6 bytes, but the manifest says 8"):
        TokenData.open(folder, verify=False)
