"""A prepared folder that is damaged or not ours: one message, with the way out, and nothing touched."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep import prepare, splits
from moe.data.shards import MANIFEST_NAME, FileStamp, TokenData
from moe.errors import DataError
from tests.unit.corpus import PREPARED, TEXTS, contents, cut, flip, page, prepared, refused, run, write_jsonl

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    path = write_jsonl(folder / "a.jsonl")
    prepared(folder, [{"type": "jsonl", "paths": [str(path)]}], shard_tokens=1000)
    return folder


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _longer(folder: Path) -> None:
    with (folder / "train-00001.bin").open("ab") as file:
        file.write(b"\0\0")


def _swap_lengths(folder: Path) -> None:
    """An index that is right in size, in sum and in hash, and wrong in between."""
    path = folder / "train-00000.idx"
    raw = bytearray(path.read_bytes())
    raw[34:36], raw[38:40] = raw[38:40], raw[34:36]
    raw[34] += 1
    raw[38] -= 1
    path.write_bytes(bytes(raw))
    _restamp(folder)


def _one_less(folder: Path) -> None:
    path = folder / "train-00000.idx"
    raw = bytearray(path.read_bytes())
    documents = int.from_bytes(raw[18:26], "little")
    raw[34 + 4 * (documents - 1)] -= 1
    path.write_bytes(bytes(raw))
    _restamp(folder)


def _restamp(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    stamp = FileStamp.of(folder / "train-00000.idx")
    manifest["splits"]["train"]["shards"][0]["idx"] = stamp.model_dump()
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def _tokens_off(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["splits"]["train"]["tokens"] += 1
    _edit(folder, splits=manifest["splits"])


def _tokenizer(folder: Path, **changes: int) -> None:
    _edit(folder, tokenizer=json.loads((folder / MANIFEST_NAME).read_text())["tokenizer"] | changes)


def _rename_shard(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["splits"]["train"]["shards"][0]["name"] = name
    _edit(folder, splits=manifest["splits"])


def _rename_tokenizer(folder: Path, name: str) -> None:
    tokenizer = json.loads((folder / MANIFEST_NAME).read_text())["tokenizer"]
    tokenizer["files"][name] = tokenizer["files"].pop("tokenizer.json")
    _edit(folder, tokenizer=tokenizer)


DAMAGES: dict[str, tuple[Damage, bool, tuple[str, ...]]] = {
    "no folder": (lambda f: shutil.rmtree(f), False, ("there is no such folder", "turnout prepare")),
    "no manifest": (
        lambda f: (f / MANIFEST_NAME).unlink(),
        False,
        ("there is no manifest.json", "not a complete data folder"),
    ),
    "a cut manifest": (
        lambda f: cut(f / MANIFEST_NAME) and None,
        False,
        ("manifest.json: this is not JSON",),
    ),
    "a foreign manifest": (
        lambda f: (f / MANIFEST_NAME).write_text("[]") and None,
        False,
        ("this is not a manifest of turnout-tokens",),
    ),
    "another version": (lambda f: _edit(f, version=2), False, ("format version 2", "reads version 1")),
    "an unknown key in the manifest": (
        lambda f: _edit(f, extra=1),
        False,
        ("manifest.json: extra: Extra inputs",),
    ),
    "totals that do not add up": (_tokens_off, False, ("manifest.json: splits.train", "the shards hold")),
    "a pad token outside the vocabulary": (
        lambda f: _tokenizer(f, pad_id=99999),
        False,
        ("manifest.json: tokenizer: pad_id is 99999", "below vocab_size, 300", "turnout prepare"),
    ),
    "an end of documents outside the vocabulary": (
        lambda f: _tokenizer(f, eos_id=300),
        False,
        ("manifest.json: tokenizer: eos_id is 300",),
    ),
    "a shard in another folder": (
        lambda f: _rename_shard(f, "../dx/train-00000"),
        False,
        ("'../dx/train-00000' is no plain file name",),
    ),
    "a tokenizer file in another folder": (
        lambda f: _rename_tokenizer(f, "../tokenizer.json"),
        False,
        ("'../tokenizer.json' is no plain file name",),
    ),
    "a missing shard": (
        lambda f: (f / "train-00001.bin").unlink(),
        False,
        ("train-00001.bin: the manifest lists this file, but it is missing",),
    ),
    "a missing index": (
        lambda f: (f / "validation-00000.idx").unlink(),
        False,
        ("validation-00000.idx", "missing"),
    ),
    "a cut shard": (
        lambda f: cut(f / "train-00000.bin") and None,
        False,
        ("train-00000.bin", "but the manifest says", "cut"),
    ),
    "a longer shard": (_longer, False, ("train-00001.bin", "but the manifest says")),
    "a flipped byte": (
        lambda f: flip(f / "train-00001.bin", 77) and None,
        True,
        ("train-00001.bin: its hash is",),
    ),
    "a flipped byte in an index": (
        lambda f: flip(f / "train-00000.idx", 40) and None,
        True,
        ("train-00000.idx: its hash is",),
    ),
    "an index of something else": (
        lambda f: flip(f / "train-00000.idx", 0) and _restamp(f),
        False,
        ("train-00000.idx: this is not a Megatron index",),
    ),
    "an index of another version": (
        lambda f: flip(f / "train-00000.idx", 9) and _restamp(f),
        False,
        ("train-00000.idx: index version 254",),
    ),
    "an index of more sequences": (
        lambda f: flip(f / "train-00000.idx", 18) and _restamp(f),
        False,
        ("train-00000.idx", "document bounds need"),
    ),
    "an index that ends elsewhere": (_one_less, False, ("train-00000.idx: it describes", "train-00000.bin")),
    "an index with holes": (
        _swap_lengths,
        True,
        ("train-00000.idx: its offsets do not follow from its lengths",),
    ),
    "a changed tokenizer": (
        lambda f: flip(f / "tokenizer" / "tokenizer.json", 100) and None,
        True,
        ("tokenizer.json: its hash is",),
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(tmp_path: Path, yard: Path, case: str) -> None:
    damage, needs_verify, words = DAMAGES[case]
    folder = tmp_path / PREPARED
    shutil.copytree(yard / PREPARED, folder)
    damage(folder)
    for verify in (True,) if needs_verify else (True, False):
        with pytest.raises(DataError) as error:
            TokenData.open(folder, verify=verify)
        assert not [word for word in words if word not in str(error.value)], error.value
    if needs_verify:
        TokenData.open(folder, verify=False)


@pytest.mark.parametrize("case", [case for case in DAMAGES if case != "no folder"])
def test_preparing_over_a_damaged_folder_is_refused_and_touches_nothing(
    tmp_path: Path, yard: Path, case: str
) -> None:
    damage, _, _ = DAMAGES[case]
    shutil.copytree(yard / PREPARED, tmp_path / PREPARED)
    damage(tmp_path / PREPARED)
    before = contents(tmp_path / PREPARED)
    result = run(tmp_path, _recipe(tmp_path, yard))
    refused(result, PREPARED)
    assert contents(tmp_path / PREPARED) == before


def _recipe(folder: Path, yard: Path) -> dict[str, Any]:
    return page(folder, [{"type": "jsonl", "paths": [str(yard / "a.jsonl")]}], shard_tokens=1000)


def test_overwrite_mends_a_damaged_folder(tmp_path: Path, yard: Path) -> None:
    shutil.copytree(yard / PREPARED, tmp_path / PREPARED)
    flip(tmp_path / PREPARED / "train-00001.bin", 77)
    refused(
        run(tmp_path, _recipe(tmp_path, yard)), "is damaged", "train-00001.bin: its hash is", "--overwrite"
    )
    assert run(tmp_path, _recipe(tmp_path, yard), "--overwrite").exit_code == 0
    assert contents(tmp_path / PREPARED) == contents(yard / PREPARED)


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("tokenizer.vocab_size=301", "tokenizer"),
        ("shard_tokens=1001", "shard_tokens"),
        ("validation.seed=1", "validation"),
    ],
)
def test_another_recipe_over_the_same_folder_is_refused(
    tmp_path: Path, yard: Path, override: str, word: str
) -> None:
    shutil.copytree(yard / PREPARED, tmp_path / PREPARED)
    result = run(tmp_path, _recipe(tmp_path, yard), override)
    refused(result, "made from another recipe", f"({word} changed)", "another output, or --overwrite")
    assert contents(tmp_path / PREPARED) == contents(yard / PREPARED)


def test_changed_text_under_the_same_recipe_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    source = {"type": "jsonl", "paths": [str(path)]}
    prepared(tmp_path, [source])
    before = contents(tmp_path / PREPARED)
    write_jsonl(path, [*TEXTS[:-1], TEXTS[-1][::-1]])
    refused(run(tmp_path, page(tmp_path, [source])), "the text of the sources changed", "--overwrite")
    assert contents(tmp_path / PREPARED) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_ours_is_never_touched(tmp_path: Path, yard: Path, overwrite: bool) -> None:
    (tmp_path / PREPARED).mkdir()
    (tmp_path / PREPARED / "thesis.txt").write_text("years of work")
    arguments = ["--overwrite"] if overwrite else []
    refused(run(tmp_path, _recipe(tmp_path, yard), *arguments), "not empty", "will not touch it")
    (tmp_path / PREPARED / MANIFEST_NAME).write_text('{"app": "something else"}')
    refused(run(tmp_path, _recipe(tmp_path, yard), *arguments), "not a manifest", "Nothing was touched")
    assert (tmp_path / PREPARED / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", PREPARED]


def test_a_run_that_comes_second_does_not_replace_the_first(
    tmp_path: Path, yard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(yard / PREPARED, tmp_path / PREPARED)
    monkeypatch.setattr(prepare, "up_to_date", lambda *_: False)  # it looked before the first one was done
    refused(run(tmp_path, _recipe(tmp_path, yard)), "another run has just filled it", "--overwrite")
    assert contents(tmp_path / PREPARED) == contents(yard / PREPARED)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, yard: Path) -> None:
    (tmp_path / PREPARED).write_text("a file")
    refused(run(tmp_path, _recipe(tmp_path, yard)), "a file is there")


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, yard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(splits.PairWriter, "add_many", full)
    result = run(tmp_path, _recipe(tmp_path, yard))
    refused(result, "writing failed (No space left on device)", "Check the disk")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
