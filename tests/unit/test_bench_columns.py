"""Figures of several runs side by side; and those in the repository are what the page says."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moe.bench.columns import command, read, tables
from moe.errors import ConfigError

HOUSE = Path(__file__).parents[2]


def _page(threads: int, dtype: str = "fp32", **ratios: float) -> dict[str, Any]:
    lines = [
        {
            "name": name.replace("_", " "),
            "version": "1.0",
            "ratio": ratio,
            "ratio_quartiles": [ratio - 0.01, ratio + 0.02],
            "peak_extra_bytes": int(ratio * 2**30) + threads,
        }
        for name, ratio in ratios.items()
    ]
    shape = {"tokens": 8, "hidden": 16}
    case = {
        "dtype": dtype,
        "routing": "real",
        "shape": shape,
        "rounds": 3,
        "batches": "same",
        "device": "cpu",
    }
    machine = {"threads": threads, "allocator": "default", "cpu": "Zen", "gpu": None}
    return {"machine": machine, "case": case, "lines": lines}


def test_runs_of_one_subject_stand_side_by_side() -> None:
    pages = [
        _page(2, dense_limit=1.0, turnout=0.9, slow=3.0),
        _page(1, dense_limit=1.0, slow=2.5, quick=1.2, turnout=1.1),
        _page(1, "bf16", dense_limit=1.0, turnout=1.3),
    ]
    bf16, fp32 = tables(pages)
    assert bf16.startswith("bf16, real routing, tokens 8, hidden 16, 3 rounds, Zen:")
    assert fp32.splitlines()[2:] == [
        "|  | 1 thread, default | 2 threads, default | MiB |",
        "| --- | --- | --- | --- |",
        "| dense limit 1.0 | 1 | 1 | 1024 |",
        "| **turnout 1.0** | **1.10** (1.09-1.12) | **0.90** (0.89-0.92) | 1126 |",
        "| quick 1.0 | 1.20 (1.19-1.22) | - | 1229 |",
        "| slow 1.0 | 2.50 (2.49-2.52) | 3.00 (2.99-3.02) | 3072 |",
    ]


def test_what_differs_stands_in_another_table_and_nothing_stands_twice() -> None:
    one, other, third = (_page(1, dense_limit=1.0, turnout=1.1) for _ in range(3))
    other["case"]["batches"] = "new"
    third["machine"]["cpu"] = "Skylake"
    assert len(tables([one, other, third])) == 3
    with pytest.raises(ConfigError, match="1 thread and the default allocator: one column cannot hold both"):
        tables([one, _page(1, dense_limit=1.0, turnout=1.3)])


def test_what_holds_no_figures_is_refused_in_a_sentence(tmp_path: Path) -> None:
    torn = _page(1, dense_limit=1.0, turnout=1.1)
    del torn["lines"][0]["ratio_quartiles"], torn["machine"]["allocator"]
    for name, text in {"words": "none", "other": json.dumps(torn), "list": "[]"}.items():
        (tmp_path / name).write_text(text)
    for name in ("words", "other", "list", "absent"):
        done = CliRunner().invoke(command, [str(tmp_path / name)])
        assert done.exit_code != 0
        assert f"{name} holds no figures of the layer's bench" in done.output
        assert "Traceback" not in done.output


def test_the_page_shows_the_figures_in_the_repository() -> None:
    pages = [read(path) for path in sorted((HOUSE / "moe/bench/results").glob("*.json"))]
    assert len(pages) == 16
    text = (HOUSE / "moe/bench/README.md").read_text(encoding="utf-8")
    for table in tables(pages):
        assert table in text
