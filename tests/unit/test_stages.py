"""Work in stages: exact accounts, the same bytes however it is shared out or stopped, nothing on partial stages."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_prep.verdicts import Judge
from moe.data.shards import MANIFEST_NAME, TokenData
from tests.unit.corpus import (
    PREPARED,
    TEXTS,
    all_texts,
    contents,
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

CJK = ["漢字", "我喜欢吃苹果和香蕉", "ねこ"]
LONG = [
    " ".join(f"{word}{(n * word) % 97}" for word in range(120)) + f" and the end of number {n}"
    for n in range(12)
]


def _pages(folder: Path) -> list[dict[str, Any]]:
    """Three sources of several files with copies across them."""
    folder.mkdir()
    for number in range(4):
        write_jsonl(folder / f"{number}.jsonl", [*TEXTS[number * 15 : number * 15 + 15], *CJK, LONG[number]])
    write_parquet(folder / "p.parquet", [*TEXTS[:5], *LONG, LONG[0] + " nearly"])
    write_text(folder / "t.txt.gz", ("\x00".join([*CJK, "hi", "hi", "e-mail me: a.b@c.de"])).encode())
    return [
        {"type": "jsonl", "paths": [f"{folder}/*.jsonl"]},
        {"type": "parquet", "paths": [f"{folder}/p.parquet"]},
        {"type": "text", "paths": [f"{folder}/t.txt.gz"], "separator": "\x00"},
    ]


STAGED = {
    "clean": {"mask_pii": True},
    "duplicates": {"exact": True, "near": {}},
    "executor": {"workers": 1},
}


def _sums(data: TokenData) -> None:
    """read + rewritten = kept + dropped, and what was kept is in the shards."""
    sources = data.manifest.sources
    for source in sources:
        fates = [source.kept, *source.dropped.values()]
        assert source.read.documents == sum(fate.documents for fate in fates)
        assert source.read.bytes + source.rewritten == sum(fate.bytes for fate in fates)
    splits = data.manifest.splits
    assert sum(source.kept.documents for source in sources) == sum(
        data.num_documents(split) for split in splits
    )
    assert sum(source.kept.bytes for source in sources) == sum(data.num_bytes(split) for split in splits)
    assert sum(source.tokens or 0 for source in sources) == sum(data.num_tokens(split) for split in splits)


def test_copies_go_and_every_document_is_accounted_for(tmp_path: Path) -> None:
    data = prepared(tmp_path, _pages(tmp_path / "in"), **STAGED)
    _sums(data)
    assert all_texts(data) == sorted([*TEXTS, *CJK, *LONG, "hi", "e-mail me: email@example.com"])
    jsonl, parquet, text = data.manifest.sources
    assert jsonl.source == f"jsonl {tmp_path}/in/*.jsonl"
    assert {why: amount.documents for why, amount in jsonl.dropped.items()} == {"exact duplicate": 9}
    assert {why: amount.documents for why, amount in parquet.dropped.items()} == {
        "exact duplicate": 9,
        "near duplicate": 1,
    }
    assert text.dropped["exact duplicate"].documents == 4
    assert text.rewritten == len("email@example.com") - len("a.b@c.de")


def test_without_any_treatment_stages_give_the_tokens_of_one_piece(tmp_path: Path) -> None:
    sources = _pages(tmp_path / "in")
    one = prepared(tmp_path, sources)
    (tmp_path / "b").mkdir()
    other = prepared(tmp_path / "b", sources, executor={"workers": 1})
    for split in ("train", "validation"):
        total = one.num_tokens(split)
        assert total == other.num_tokens(split)
        assert np.array_equal(one.tokens(split, 0, total), other.tokens(split, 0, total))
    _sums(other)


@pytest.fixture(scope="module")
def yard_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    source = {"type": "jsonl", "paths": [str(write_jsonl(folder / "a.jsonl"))]}
    return prepared(folder, [source]).tokenizer_folder


def _read_twice(tokenizer: Path) -> dict[str, Any]:
    """Settings by which the text is read to be judged, and once more to be encoded."""
    return {
        "clean": None,
        "tokenizer": {"type": "file", "path": str(tokenizer)},
        "executor": {"workers": 1},
    }


def _tests_of(folder: Path) -> dict[str, Any]:
    return {"paths": [str(write_jsonl(folder / "eval.jsonl", [LONG[3]]))]}


def test_text_that_is_read_twice_and_written_nowhere_gives_the_same_tokens_and_accounts(
    tmp_path: Path, yard_tokenizer: Path
) -> None:
    sources, made = _pages(tmp_path / "in"), []
    settings = {**STAGED, **_read_twice(yard_tokenizer), "decontaminate": _tests_of(tmp_path)}
    for name, clean in (("twice", None), ("written", {"normalise": False})):
        (tmp_path / name).mkdir()
        made.append(prepared(tmp_path / name, sources, **{**settings, "clean": clean}))
        _sums(made[-1])
        assert (tmp_path / name / f"{PREPARED}.stages" / "text").exists() == (name == "written")
    twice, written = (contents(data.folder) for data in made)
    assert made[0].manifest.sources == made[1].manifest.sources
    assert set(made[0].manifest.sources[1].dropped) == {"contaminated", "exact duplicate", "near duplicate"}
    differing = {name for name in twice | written if twice.get(name) != written.get(name)}
    assert differing <= {MANIFEST_NAME, f"{MANIFEST_NAME}.xxh3", "report.json", "report.html"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text + '{"text": "one more"}\n', ("encode 00000", "other documents now than the")),
        (lambda text: text.replace("signal", "sIgnal"), ("in/0.jsonl", "changed while it was read")),
    ],
)
def test_a_file_that_changes_between_the_two_times_that_it_is_read_is_told(
    tmp_path: Path,
    yard_tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[str], str],
    words: Sequence[str],
) -> None:
    recipe = page(tmp_path, _pages(tmp_path / "in"), **{**STAGED, **_read_twice(yard_tokenizer)})
    path, judge = tmp_path / "in" / "0.jsonl", Judge.__call__

    def and_change(self: Judge, folder: Path) -> dict[str, Any]:
        path.write_text(change(path.read_text()))
        return judge(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "__call__", and_change)
        refused(run(tmp_path, recipe), *words, "--overwrite")
    assert not (tmp_path / PREPARED).exists()
    refused(run(tmp_path, recipe), "(sources changed)", "--overwrite")
    assert run(tmp_path, recipe, "--overwrite").exit_code == 0


@pytest.mark.parametrize("is_read_twice", [False, True])
@pytest.mark.parametrize("counts", [(1, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)])
def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, yard_tokenizer: Path, counts: tuple[int, ...], is_read_twice: bool
) -> None:
    sources = _pages(tmp_path / "in")
    settings = {**STAGED, **(_read_twice(yard_tokenizer) if is_read_twice else {})}
    made = []
    for workers in counts:
        folder = tmp_path / str(workers)
        folder.mkdir()
        data = prepared(folder, sources, **{**settings, "executor": {"workers": workers}})
        made.append(contents(data.folder))
    assert all(bytes_of == made[0] for bytes_of in made)


def test_parts_change_nothing_but_the_bounds_of_shards(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [" ".join(f"w{(n * k) % 1009}" for k in range(600)) for n in range(900)]
    write_jsonl(folder / "a.jsonl", [*texts, *texts[:50], *(text + " x" for text in texts[50:80])])
    sources, ids = [{"type": "jsonl", "paths": [f"{folder}/a.jsonl"]}], []
    for part in (1, 64):
        (tmp_path / str(part)).mkdir()
        settings = {**STAGED, "clean": {"normalise": False}}
        data = prepared(tmp_path / str(part), sources, **settings, part_megabytes=part)
        ids.append(data.tokens("train", 0, data.num_tokens("train")))
        _sums(data)
        (source,) = data.manifest.sources
        assert source.dropped["exact duplicate"].documents == 50
        assert source.dropped["near duplicate"].documents == 30
    assert np.array_equal(*ids)


def test_bad_rows_go_into_quarantine_with_their_reason(tmp_path: Path) -> None:
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    bad = [
        b'{"text": "cut',
        b'{"body": "x"}',
        b'{"text": 7}',
        b"[1]",
        b'{"text": "\xff"}',
        b'{"text": ""}',
        b'{"text": null}',
    ]
    path = write_text(tmp_path / "a.jsonl", b"\n".join([*good[:30], *bad, *good[30:]]))
    data = prepared(
        tmp_path, [{"type": "jsonl", "paths": [str(path)]}], bad_rows="quarantine", executor={"workers": 1}
    )
    _sums(data)
    (source,) = data.manifest.sources
    assert {why: amount.documents for why, amount in source.dropped.items()} == {
        "empty": 1,
        "invalid UTF-8": 1,
        "no text": 2,
        "not JSON": 1,
        "not a string": 1,
        "null": 1,
    }
    lines = [json.loads(line) for line in (data.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines if line["where"]] == [f"{path}:{n}" for n in (31, 32, 33, 34)]
    assert lines[0]["begins"] == '{"text": "cut'
    assert all_texts(data) == sorted(TEXTS)


def test_a_giant_document_is_a_counted_drop(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "x" * 1_000_001])
    data = prepared(
        tmp_path,
        [{"type": "jsonl", "paths": [str(path)]}],
        clean={"max_megabytes": 1},
        executor={"workers": 1},
    )
    assert data.manifest.sources[0].dropped["longer than clean.max_megabytes"].bytes == 1_000_001
    _sums(data)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_cut_file_is_named_and_nothing_is_left_half_written(tmp_path: Path, name: str) -> None:
    kind = name.split(".")[1]
    path = (write_parquet if kind == "parquet" else write_jsonl)(tmp_path / name)
    cut(path)
    recipe = page(
        tmp_path, [{"type": kind, "paths": [str(path)]}], bad_rows="quarantine", executor={"workers": 1}
    )
    refused(run(tmp_path, recipe), "stage text 00000", str(path), "cut or damaged")
    assert not (tmp_path / PREPARED).exists()
    left = sorted(found.name for found in (tmp_path / f"{PREPARED}.stages").rglob("*"))
    assert left == ["stages.json", "text"]


def test_every_planted_run_of_words_is_found(tmp_path: Path) -> None:
    draw = random.Random(0)
    tests = [" ".join(f"q{draw.randrange(10**6)}" for _ in range(40)) for _ in range(50)]
    write_jsonl(tmp_path / "eval.jsonl", tests, field="question")
    clean = [" ".join(f"q{draw.randrange(10**6)}" for _ in range(60)) for _ in range(300)]
    planted, spared = [], []
    for number, text in enumerate(clean[:200]):
        words, test = text.split(), draw.choice(tests).split()
        at, place = draw.randrange(27), draw.randrange(60)
        length = 13 if number % 2 else 12
        run_of = " ,".join(test[at : at + length]).upper()
        (planted if length == 13 else spared).append(" ".join([*words[:place], run_of, *words[place:]]))
    path = write_jsonl(tmp_path / "a.jsonl", [*planted, *spared, *clean[200:]])
    data = prepared(
        tmp_path,
        [{"type": "jsonl", "paths": [str(path)]}],
        decontaminate={"paths": [str(tmp_path / "eval.jsonl")], "fields": ["question"]},
        executor={"workers": 1},
    )
    assert data.manifest.sources[0].dropped["contaminated"].documents == len(planted) == 100
    assert all_texts(data) == sorted([*spared, *clean[200:]])


def test_a_second_run_does_only_what_is_missing(tmp_path: Path) -> None:
    sources = _pages(tmp_path / "in")
    before = contents(prepared(tmp_path, sources, **STAGED).folder)
    stages = tmp_path / f"{PREPARED}.stages"
    times = {path: path.stat().st_mtime_ns for path in stages.rglob("*.json")}
    shutil.rmtree(tmp_path / PREPARED)
    shutil.rmtree(stages / "encode" / "00001")
    flip(next((stages / "marks" / "00000").glob("bands.npy")), 200)
    assert contents(prepared(tmp_path, sources, **STAGED).folder) == before
    again = {path for path in stages.rglob("*.json") if path.stat().st_mtime_ns != times[path]}
    assert again == {stages / "encode" / "00001.json", stages / "marks" / "00000.json"}
    assert "up to date" in run(tmp_path, page(tmp_path, sources, **STAGED)).stderr


@pytest.mark.parametrize(
    ("change", "word"),
    [({"clean": {"mask_pii": False}}, "recipe"), ({"validation": {"fraction": 0.5}}, "recipe")],
)
def test_another_recipe_over_the_same_stages_is_refused(
    tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    sources = _pages(tmp_path / "in")
    prepared(tmp_path, sources, **STAGED)
    shutil.rmtree(tmp_path / PREPARED)
    refused(
        run(tmp_path, page(tmp_path, sources, **{**STAGED, **change})), f"({word} changed)", "--overwrite"
    )
    result = run(tmp_path, page(tmp_path, sources, **{**STAGED, **change}), "--overwrite")
    assert result.exit_code == 0


def test_a_block_that_was_removed_is_another_recipe_too(tmp_path: Path) -> None:
    sources = [{"type": "jsonl", "paths": [str(write_jsonl(tmp_path / "a.jsonl"))]}]
    blocks = {**STAGED, "bad_rows": "quarantine", "validation": {"fraction": 0.2}}
    made = contents(prepared(tmp_path, sources, **blocks).folder)
    for block in ("clean", "duplicates", "bad_rows"):
        fewer = page(tmp_path, sources, **{key: value for key, value in blocks.items() if key != block})
        refused(run(tmp_path, fewer), f"({block} changed)", "another output, or --overwrite")
    refused(run(tmp_path, page(tmp_path, sources)), "clean, duplicates, bad_rows, part_megabytes changed")
    assert contents(tmp_path / PREPARED) == made


def test_a_stage_does_not_begin_on_a_partial_one(tmp_path: Path) -> None:
    recipe = page(tmp_path, _pages(tmp_path / "in"), **STAGED)
    refused(
        run(tmp_path, recipe, "--stage", "marks"), "3 of 3 parts of this stage are missing", "--stage text"
    )
    assert run(tmp_path, recipe, "--stage", "text").exit_code == 0
    (part,) = (tmp_path / f"{PREPARED}.stages" / "text" / "00001").glob("*.parquet")
    flip(part, 100)
    refused(run(tmp_path, recipe, "--stage", "marks"), "text 00001 first", "missing or damaged")
    assert run(tmp_path, recipe).exit_code == 0


def test_a_dry_run_tells_and_does_nothing(tmp_path: Path) -> None:
    recipe = page(tmp_path, _pages(tmp_path / "in"), **STAGED)
    told = run(tmp_path, recipe, "--dry-run")
    assert told.stdout == "text: 3 parts, 0 of them done; then marks, verdicts, tokenizer, encode\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "recipe.yaml"]
    made = contents(prepared(tmp_path, _pages(tmp_path / "more"), **STAGED).folder)
    recipe = page(tmp_path, _pages(tmp_path / "again"), **STAGED)
    refused(run(tmp_path, recipe, "--dry-run"), "--overwrite")
    told = run(tmp_path, recipe, "--dry-run", "--overwrite")
    assert told.stdout.startswith("text: 3 parts, 0 of them done")
    assert contents(tmp_path / PREPARED) == made


def test_a_dry_run_over_what_is_done_says_so(tmp_path: Path) -> None:
    sources = _pages(tmp_path / "in")
    prepared(tmp_path, sources, **STAGED)
    recipe = page(tmp_path, sources, **STAGED)
    told = run(tmp_path, recipe, "--dry-run")
    assert (told.exit_code, told.stdout) == (0, "")
    assert "up to date" in told.stderr
    shutil.rmtree(tmp_path / PREPARED)
    told = run(tmp_path, recipe, "--dry-run")
    assert "encode: 3 parts, 3 of them done\nall stages are done" in told.stdout
    assert not (tmp_path / PREPARED).exists()


def test_a_recipe_that_failed_at_once_can_be_mended_without_overwriting(tmp_path: Path) -> None:
    sources = _pages(tmp_path / "in")
    bad = {**STAGED, "clean": {"language": {"keep": ["en"], "model": "no/such.bin"}}}
    refused(run(tmp_path, page(tmp_path, sources, **bad)), "no/such.bin", "leave clean.language out")
    prepared(tmp_path, sources, **STAGED)


def test_a_torn_page_of_stages_is_no_page_of_this_recipe(tmp_path: Path) -> None:
    sources = _pages(tmp_path / "in")
    prepared(tmp_path, sources, **STAGED)
    shutil.rmtree(tmp_path / PREPARED)
    cut(tmp_path / f"{PREPARED}.stages" / "stages.json")
    refused(run(tmp_path, page(tmp_path, sources, **STAGED)), "--overwrite to begin anew")


WAITS_AMID_A_PART = """
import time
from data_prep import run, texts
read = texts.ReadAndClean.__call__

def read_and_wait(part, folder):
    read(part, folder)
    (folder / "amid").touch()
    time.sleep(600)

texts.ReadAndClean.__call__ = read_and_wait
run.command()
"""


def test_a_command_that_is_told_to_end_leaves_nothing_half_done(tmp_path: Path) -> None:
    recipe = page(
        tmp_path, _pages(tmp_path / "in"), **{**STAGED, "executor": {"workers": 1}}, part_megabytes=1
    )
    process = _turnout(tmp_path, recipe, "-c", WAITS_AMID_A_PART)
    until = time.monotonic() + 120
    while not list(tmp_path.glob(f"{PREPARED}.stages/text/*/amid")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.terminate()
    assert process.wait(120) == 1
    assert not [path for path in tmp_path.rglob("*") if "unfinished" in path.name or "lock" in path.name]


def _turnout(folder: Path, recipe: Mapping[str, Any], *program: str) -> subprocess.Popen[bytes]:
    """`turnout prepare` of the recipe, or a program of Python's that does it otherwise."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(recipe)))
    return subprocess.Popen(
        [sys.executable, *(program or ("-m", "data_prep.run")), str(path)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _killed_again_and_again(
    folder: Path, sources: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], kills: int
) -> None:
    recipe = page(folder, sources, **{**settings, "executor": {"workers": 2}})
    draw = random.Random(0)
    for _ in range(kills):
        process = _turnout(folder, recipe)
        time.sleep(draw.uniform(0.3, 3.0))
        process.kill() if draw.random() < 0.5 else os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (folder / PREPARED / MANIFEST_NAME).exists():
            shutil.rmtree(folder / PREPARED)
            shutil.rmtree(folder / f"{PREPARED}.stages")
    assert _turnout(folder, recipe).wait(200) == 0


@pytest.mark.parametrize(
    ("kills", "is_read_twice"),
    [
        (2, False),
        pytest.param(20, False, marks=pytest.mark.slow),
        pytest.param(20, True, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_and_run_again_the_bytes_are_the_same(
    tmp_path: Path, yard_tokenizer: Path, kills: int, is_read_twice: bool
) -> None:
    sources = _pages(tmp_path / "in")
    settings = {**STAGED, **(_read_twice(yard_tokenizer) if is_read_twice else {})}
    (tmp_path / "calm").mkdir()
    (tmp_path / "killed").mkdir()
    calm = prepared(tmp_path / "calm", sources, **settings)
    _killed_again_and_again(tmp_path / "killed", sources, settings, kills)
    assert contents(tmp_path / "killed" / PREPARED) == contents(calm.folder)
    assert not list(tmp_path.rglob("*.unfinished"))


def test_another_test_set_over_the_same_output_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, *LONG])
    tests = write_jsonl(tmp_path / "eval.jsonl", [LONG[0]])
    settings = {"decontaminate": {"paths": [str(tests)]}, "executor": {"workers": 1}}
    sources = [{"type": "jsonl", "paths": [str(path)]}]
    assert prepared(tmp_path, sources, **settings).manifest.sources[0].dropped["contaminated"].documents == 1
    write_jsonl(tests, [LONG[0], LONG[5]])
    recipe = page(tmp_path, sources, **settings)
    refused(run(tmp_path, recipe), "the tests, lists or models that it names changed", "--overwrite")
    assert run(tmp_path, recipe, "--overwrite").exit_code == 0
    data = TokenData.open(tmp_path / PREPARED, verify=True)
    assert data.manifest.sources[0].dropped["contaminated"].documents == 2
