"""Text that nothing has to see before it is encoded goes straight to the encoder, with the same accounts and tokens."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moe.data.shards import TokenData
from tests.unit.corpus import (
    PREPARED,
    TEXTS,
    contents,
    cut,
    page,
    prepared,
    refused,
    run,
    write_jsonl,
    write_parquet,
    write_text,
)

CJK = ["漢字", "我喜欢吃苹果和香蕉", "ねこ"]
Pages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("made before")
    source = {"type": "jsonl", "paths": [str(write_jsonl(folder / "a.jsonl", [*TEXTS, *CJK]))]}
    return {"type": "file", "path": str(prepared(folder, [source]).tokenizer_folder)}


@pytest.fixture
def sources(tmp_path: Path) -> Pages:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        write_jsonl(folder / f"{number}.jsonl", [*TEXTS[number * 15 : number * 15 + 15], *CJK, ""])
    write_parquet(folder / "p.parquet", [*TEXTS[:5], None])
    write_text(folder / "bad.jsonl.gz", b'{"text": "good"}\n{"text": "cut')
    write_text(folder / "t.txt.gz", ("\x00".join([*CJK, "hi", "a.b@c.de"])).encode())
    return [
        {"type": "jsonl", "paths": [f"{folder}/*.jsonl*"]},
        {"type": "parquet", "paths": [f"{folder}/p.parquet"]},
        {"type": "text", "paths": [f"{folder}/t.txt.gz"], "separator": "\x00"},
    ]


def _made(folder: Path, sources: Pages, tokenizer: dict[str, Any], **settings: Any) -> TokenData:
    folder.mkdir()
    settings = {"bad_rows": "quarantine", "executor": {"workers": 1}, **settings}
    return prepared(folder, sources, tokenizer=tokenizer, **settings)


def _stages(folder: Path) -> set[str]:
    return {path.name for path in (folder / f"{PREPARED}.stages").iterdir() if path.is_dir()}


def _tokens(data: TokenData) -> list[np.ndarray[Any, Any]]:
    return [data.tokens(split, 0, data.num_tokens(split)) for split in data.manifest.splits]


def test_the_tokens_and_the_accounts_are_those_of_text_that_was_written_between(
    tmp_path: Path, sources: Pages, tokenizer: dict[str, Any]
) -> None:
    settings = {"clean": {"mask_pii": True}}
    straight = _made(tmp_path / "a", sources, tokenizer, **settings)
    asked = write_jsonl(tmp_path / "asked.jsonl", [" ".join(f"q{number}" for number in range(13))])
    settings_between = {**settings, "decontaminate": {"paths": [str(asked)]}}
    between = _made(tmp_path / "b", sources, tokenizer, **settings_between)
    assert (_stages(tmp_path / "a"), "text" in _stages(tmp_path / "b")) == ({"tokenizer", "encode"}, True)
    assert straight.manifest.sources == between.manifest.sources
    assert straight.manifest.sources[0].dropped.keys() == {"empty", "not JSON"}
    for one, other in zip(_tokens(straight), _tokens(between), strict=True):
        assert np.array_equal(one, other)
    pages = [(data.folder / "quarantine.jsonl").read_bytes() for data in (straight, between)]
    assert pages[0] == pages[1]
    assert [json.loads(line)["reason"] for line in pages[0].splitlines()].count("not JSON") == 1


@pytest.mark.parametrize("counts", [(1, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)])
def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, sources: Pages, tokenizer: dict[str, Any], counts: tuple[int, ...]
) -> None:
    made = [
        contents(_made(tmp_path / str(count), sources, tokenizer, executor={"workers": count}).folder)
        for count in counts
    ]
    assert all(bytes_of == made[0] for bytes_of in made)


def test_a_large_file_is_cut_into_parts_first(tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [" ".join(f"w{(n * k) % 1009}" for k in range(600)) for n in range(1500)]
    )
    assert path.stat().st_size > 4 * 10**6
    source = [{"type": "jsonl", "paths": [str(path)]}]
    cut_up = _made(tmp_path / "a", source, tokenizer, part_megabytes=1)
    whole = _made(tmp_path / "b", source, tokenizer)
    assert (_stages(tmp_path / "a"), _stages(tmp_path / "b")) == (
        {"text", "tokenizer", "encode"},
        {"tokenizer", "encode"},
    )
    for one, other in zip(_tokens(cut_up), _tokens(whole), strict=True):
        assert np.array_equal(one, other)


def test_a_stage_that_there_is_not_is_refused(
    tmp_path: Path, sources: Pages, tokenizer: dict[str, Any]
) -> None:
    recipe = page(tmp_path, sources, tokenizer=tokenizer, bad_rows="quarantine")
    refused(run(tmp_path, recipe, "--stage", "text"), "--stage text", "Use --stage tokenizer")
    refused(
        run(tmp_path, recipe, "--stage", "encode"),
        "1 of 1 parts of this stage are missing",
        "--stage tokenizer",
    )
    for stage in ("tokenizer", "encode"):
        assert run(tmp_path, recipe, "--stage", stage).exit_code == 0
    judged = {**recipe, "duplicates": {"exact": True}, "output": str(tmp_path / "judged")}
    refused(run(tmp_path, judged, "--stage", "text"), "Use --stage marks")
    assert run(tmp_path, judged, "--stage", "marks").exit_code == 0
    assert "encode: 3 parts, 3 of them done" in run(tmp_path, recipe, "--dry-run").stdout


def test_a_cut_file_is_named_and_nothing_is_left_half_written(
    tmp_path: Path, tokenizer: dict[str, Any]
) -> None:
    path = cut(write_jsonl(tmp_path / "a.jsonl.zst"))
    source = {"type": "jsonl", "paths": [str(path)]}
    recipe = page(tmp_path, [source], tokenizer=tokenizer, executor={"workers": 2})
    refused(run(tmp_path, recipe), "stage encode 00000", str(path), "cut or damaged")
    assert not (tmp_path / PREPARED).exists()
    assert not list((tmp_path / f"{PREPARED}.stages" / "encode").iterdir())


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again_the_bytes_are_the_same(
    tmp_path: Path, sources: Pages, tokenizer: dict[str, Any]
) -> None:
    calm = contents(_made(tmp_path / "calm", sources, tokenizer).folder)
    folder = tmp_path / "killed"
    folder.mkdir()
    path = folder / "recipe.yaml"
    settings = {"tokenizer": tokenizer, "bad_rows": "quarantine", "executor": {"workers": 2}}
    path.write_text(yaml.safe_dump(page(folder, sources, **settings)))
    command = [sys.executable, "-m", "data_prep.run", str(path)]
    draw = random.Random(0)
    for _ in range(20):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(draw.uniform(0.5, 1.5))
        process.kill() if draw.random() < 0.5 else os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(folder / PREPARED) == calm
    assert not list(tmp_path.rglob("*.unfinished"))
