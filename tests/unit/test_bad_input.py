"""Bad input and bad disks in the staged pipeline: a counted drop or a clear error, nothing lost or half written."""

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from data_prep import parts
from data_prep.verbs import command
from moe.data.manifest import CHECKSUM_NAME
from moe.data.shards import MANIFEST_NAME, Index, TokenData
from tests.unit.corpus import (
    PREPARED,
    TEXTS,
    all_texts,
    cut,
    flip,
    page,
    prepared,
    refused,
    run,
    write_jsonl,
    write_parquet,
    write_text,
)

HERE = {"executor": {"workers": 1}}
SPECIAL = "a <|endoftext|> in text, and <|pad|><|endoftext|>"


def test_names_of_special_tokens_in_text_stay_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, SPECIAL])
    data = prepared(tmp_path, [{"type": "jsonl", "paths": [str(path)]}], **HERE)
    assert all_texts(data) == sorted([*TEXTS, SPECIAL])


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_vocabulary_beyond_16_bits_has_wide_shards(tmp_path: Path, fast: bool) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, SPECIAL])
    sources = [{"type": "jsonl", "paths": [str(path)]}]
    (tmp_path / "small").mkdir()
    tokenizer = prepared(tmp_path / "small", sources).tokenizer_folder / "tokenizer.json"
    told = json.loads(tokenizer.read_text())
    last = 70_000
    told["model"]["vocab"] |= {f"unused {n}": n for n in range(300, last)}
    (end,) = (token for token in told["added_tokens"] if token["content"] == "<|endoftext|>")
    told["model"]["vocab"] |= {"unused 0": end["id"], "<|endoftext|>": last}
    end["id"] = last
    told["added_tokens"].sort(key=lambda token: token["id"])
    wide = tmp_path / "tokenizer.json"
    wide.write_text(json.dumps(told))
    data = prepared(
        tmp_path,
        sources,
        tokenizer={"type": "file", "path": str(wide), "fast": fast},
        part_megabytes=1,
        **HERE,
    )
    assert (data.vocab_size, data.eos_id, data.manifest.dtype) == (last + 1, last, "int32")
    assert Index.read(data.folder / "train-00000.idx").dtype == "int32"
    ids_N = data.tokens("train", 0, data.num_tokens("train"))
    assert np.count_nonzero(ids_N == last) == data.num_documents("train")
    assert all_texts(data) == sorted([*TEXTS, SPECIAL])


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", field="content")
    recipe = page(tmp_path, [{"type": "parquet", "paths": [str(path)]}], bad_rows="quarantine", **HERE)
    refused(run(tmp_path, recipe), "stage text 00000", "there is no column 'text', only 'content', 'n'")
    assert not (tmp_path / PREPARED).exists()


def test_empty_and_broken_documents_of_every_kind_are_counted(tmp_path: Path) -> None:
    texts = write_text(
        tmp_path / "a.txt", b"\0".join([*map(str.encode, TEXTS), b"", b" \n", b"\xff\xfe", b"\xc3"])
    )
    rows = write_parquet(tmp_path / "a.parquet", [*(f"row {n}" for n in range(9)), "", None])
    data = prepared(
        tmp_path,
        [
            {"type": "text", "paths": [str(texts)], "separator": "\0"},
            {"type": "parquet", "paths": [str(rows)]},
        ],
        **HERE,
    )
    text, parquet = data.manifest.sources
    assert {why: amount.model_dump() for why, amount in text.dropped.items()} == {
        "empty": {"documents": 2, "bytes": 2},
        "invalid UTF-8": {"documents": 2, "bytes": 3},
    }
    assert {why: amount.documents for why, amount in parquet.dropped.items()} == {"empty": 1, "null": 1}
    assert all_texts(data) == sorted([*TEXTS, *(f"row {n}" for n in range(9))])


@contextmanager
def _small_disk(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """At `folder`, a disk of a megabyte; where none can be mounted, a writer that meets a full one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    with patch.context() as context:
        context.setattr(parts.PartWriter, "add", full)
        yield


def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    texts = [" ".join(f"{draw.randrange(2**32):x}" for _ in range(4_000)) for _ in range(80)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    sources = [{"type": "jsonl", "paths": [str(path)]}]
    disk = tmp_path / "disk"
    with _small_disk(disk, monkeypatch):
        recipe = page(disk, sources, part_megabytes=1, **HERE)
        refused(run(tmp_path, recipe), "stage text 00000", "No space left", "what is finished stays")
        assert not (disk / PREPARED).exists()
        assert [found.name for found in (disk / f"{PREPARED}.stages" / "text").iterdir()] == []


@pytest.mark.parametrize("staged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_any_flipped_byte_of_the_manifest_is_named(tmp_path: Path, staged: bool) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    data = prepared(tmp_path, [{"type": "jsonl", "paths": [str(path)]}], **(HERE if staged else {}))
    manifest, checksum = data.folder / MANIFEST_NAME, data.folder / CHECKSUM_NAME
    whole = manifest.read_bytes()
    draw = random.Random(0)
    for trial in range(40):
        at = draw.randrange(len(whole))
        flip(manifest, at) if trial % 4 else cut(manifest, at / len(whole))
        result = CliRunner().invoke(command, ["verify", str(data.folder)])
        manifest.write_bytes(whole)
        assert result.exit_code == 2
        assert f"{manifest}: " in result.stderr
    assert CliRunner().invoke(command, ["verify", str(data.folder)]).exit_code == 0
    flip(checksum, 3)
    refused(CliRunner().invoke(command, ["verify", str(data.folder)]), CHECKSUM_NAME)
    checksum.unlink()  # a folder made before there was one
    assert CliRunner().invoke(command, ["verify", str(data.folder)]).exit_code == 0


def _look(data: TokenData, *arguments: str) -> Result:
    verb, *options = arguments
    return CliRunner().invoke(command, [verb, str(data.folder), *options])


def test_looking_into_a_damaged_folder_says_what_is_damaged(tmp_path: Path) -> None:
    """Of the right sizes, so that it is found only where it is used."""
    data = prepared(tmp_path, [{"type": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl"))]}])
    tokenizer, index = data.tokenizer_folder / "tokenizer.json", data.folder / "train-00000.idx"
    whole = tokenizer.read_bytes()
    flip(tokenizer, 0)
    refused(_look(data, "sample"), "tokenizer.json: the tokenizer cannot be read", "copy the folder again")
    assert _look(data, "stats").exit_code == 0
    tokenizer.write_bytes(whole)
    whole = index.read_bytes()
    for at, value in ((37, 0x7F), (37, 0xFF), (34, 0xFE)):  # bytes of the first document's length
        changed = bytearray(whole)
        changed[at] = value
        index.write_bytes(changed)
        for verb in ("sample", "stats"):
            refused(_look(data, verb), "train-00000.idx: its documents have", "but the manifest says")
    index.write_bytes(whole)
    for name in (CHECKSUM_NAME, MANIFEST_NAME):
        (data.folder / name).unlink()
        (data.folder / name).mkdir()
        refused(_look(data, "verify"), f"{name}: ", "cannot be read (Is a directory)")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_what_cannot_be_printed_is_an_error_and_a_reader_that_went_away_is_none(tmp_path: Path) -> None:
    data = prepared(tmp_path, [{"type": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl"))]}])
    verb = [sys.executable, "-m", "data_prep.verbs", "sample", str(data.folder), "-n", "60"]
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(verb, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (found.returncode, found.stderr[:42]) == (2, "error: standard output: No space left on d")
    reads, writes = os.pipe()
    os.close(reads)
    found = subprocess.run(verb, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (found.returncode, found.stderr) == (1, "")
