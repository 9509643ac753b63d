"""Shards of Megatron and datatrove: read as their own documents say, and refused where their parts do not fit."""

import pickle
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from moe.data.foreign import ForeignTokens
from moe.data.rows import open_rows
from moe.errors import DataError

DOCUMENTS = [[5, 6, 7, 8], [9], [10, 11, 12], [13, 14, 15, 16, 17, 18]]
Kind = Literal["megatron", "datatrove"]


def _datatrove(folder: Path, name: str, documents: list[list[int]], dtype: str) -> None:
    """As datatrove 0.10's TokenizedFile writes them."""
    ids = np.concatenate([np.array(ids, dtype=dtype) for ids in documents])
    (folder / f"{name}.ds").write_bytes(ids.tobytes())
    ends = np.cumsum([len(ids) for ids in documents]).tolist()
    (folder / f"{name}.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    (folder / f"{name}.ds.metadata").write_text(f"tokenizer|{ids.itemsize}\n{len(ids)}\n")


def _megatron(folder: Path, name: str, documents: list[list[int]], dtype: str) -> None:
    """As Megatron's IndexedDatasetBuilder writes them, each document in sentences of two tokens."""
    code, ids = (
        {"uint16": 8, "int32": 4}[dtype],
        np.concatenate([np.array(d, dtype=dtype) for d in documents]),
    )
    sentences = [min(2, len(d) - at) for d in documents for at in range(0, len(d), 2)]
    bounds = np.cumsum([0, *(-(-len(d) // 2) for d in documents)])
    offsets = (np.cumsum(sentences) - sentences) * ids.itemsize
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(sentences), len(bounds))
    body = (
        np.array(sentences, "<i4").tobytes()
        + offsets.astype("<i8").tobytes()
        + bounds.astype("<i8").tobytes()
    )
    (folder / f"{name}.bin").write_bytes(ids.tobytes())
    (folder / f"{name}.idx").write_bytes(header + body)


def _write(folder: Path, kind: Kind, wide: bool) -> ForeignTokens:
    folder.mkdir(exist_ok=True)
    for name, documents in (("00001", DOCUMENTS[2:]), ("00000", DOCUMENTS[:2])):
        if kind == "megatron":
            _megatron(folder, name, documents, "int32" if wide else "uint16")
        else:
            _datatrove(folder, name, documents, "uint32" if wide else "uint16")
    return ForeignTokens.open(folder, kind, 100, 1)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", ["megatron", "datatrove"])
def test_documents_come_back_across_shards(tmp_path: Path, kind: Kind, wide: bool) -> None:
    data = _write(tmp_path / "d", kind, wide)
    ids = [token for document in DOCUMENTS for token in document]
    assert data.document_lengths("train").tolist() == [len(document) for document in DOCUMENTS]
    assert data.num_tokens("train") == len(ids)
    assert data.num_tokens("validation") == 0
    for start in range(len(ids) + 1):
        for stop in range(start, len(ids) + 1):
            assert data.tokens("train", start, stop).tolist() == ids[start:stop]
    with pytest.raises(IndexError):
        data.tokens("train", 0, len(ids) + 1)
    assert pickle.loads(pickle.dumps(data)).fingerprint == data.fingerprint
    rows = open_rows(data, "train", 8, "best_fit", apart=True, seed=0)
    assert sorted(token for at in range(len(rows)) for token in rows[at].ids_S[: rows[at].filled]) == ids


@pytest.mark.parametrize("kind", ["megatron", "datatrove"])
def test_shards_of_several_widths_and_empty_ones_are_read_as_one(tmp_path: Path, kind: Kind) -> None:
    """An empty .ds file does not even say how wide its ids are; and a pad token added later may be beyond them."""
    write, wide = (_megatron, "int32") if kind == "megatron" else (_datatrove, "uint32")
    for name, documents, dtype in (
        ("00000", [[]], wide),
        ("00001", DOCUMENTS[:2], "uint16"),
        ("00002", DOCUMENTS[2:3], wide),
        ("00003", DOCUMENTS[3:], "uint16"),
    ):
        write(tmp_path, name, documents, dtype)
    data = ForeignTokens.open(tmp_path, kind, 100_000, 70_000)
    assert data.document_lengths("train").tolist() == [0, *map(len, DOCUMENTS)]
    ids = [token for document in DOCUMENTS for token in document]
    assert data.pieces("train", [2, 0], [9, 2]).tolist() == [*ids[2:11], *ids[:2]]
    rows = open_rows(data, "train", 8, "best_fit", apart=True, seed=0)
    found = sorted(token for at in range(len(rows)) for token in rows[at].ids_S.tolist())
    assert found == ids + [70_000] * (8 * len(rows) - len(ids))


@pytest.mark.parametrize("kind", ["megatron", "datatrove"])
def test_parts_that_do_not_fit_each_other_are_refused(tmp_path: Path, kind: Kind) -> None:
    ids, bounds = {"megatron": ("bin", "idx"), "datatrove": ("ds", "ds.index")}[kind]
    for name, change, words in (
        (f"00000.{ids}", lambda raw: raw[:-1], "cut"),
        (f"00000.{ids}", lambda raw: raw * 3, "cut"),
        (f"00000.{bounds}", lambda raw: raw[:-3], "cut or damaged"),
        (f"00000.{bounds}", lambda _: None, "cannot be read|no such|are no"),
        (f"00000.{ids}", lambda _: None, "cannot be read"),
    ):
        folder = tmp_path / "d"
        _write(folder, kind, False)
        path = folder / name
        changed = change(path.read_bytes())
        path.unlink() if changed is None else path.write_bytes(changed)
        if changed is None and name.endswith((".idx", ".ds")):
            (folder / f"00001.{bounds if kind == 'megatron' else ids}").unlink()
            words = "there are no"
        with pytest.raises(DataError, match=words):
            ForeignTokens.open(folder, kind, 100, 1)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "d", "datatrove", False)
    data = ForeignTokens.open(tmp_path / "d", "datatrove", 12, 1)
    assert data.tokens("train", 0, 4).tolist() == [5, 6, 7, 8]
    with pytest.raises(DataError, match=r"is 18, but the tokenizer of data\.path has 12 tokens"):
        data.tokens("train", 0, 14)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        ForeignTokens.open(tmp_path / "none", "megatron", 100, 1)
    with pytest.raises(DataError, match="there are no datatrove shards here"):
        ForeignTokens.open(tmp_path, "datatrove", 100, 1)
