import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moe.errors import CheckpointError
from moe.report import command, plot
from moe.report.plot import plot_run
from moe.report.records import read


def training(step: int, *, layers: int = 2, experts: int = 4, loss: float | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": step,
        "loss": 5.0 / step if loss is None else loss,
        "tokens_per_second": 900.0,
    }
    if layers:
        row["tokens_per_expert"] = [[step + expert for expert in range(experts)] for _ in range(layers)]
        row["max_violation"] = 0.3
    return row


def evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "validation_loss": 5.2 / step, "bits_per_byte": 1.1}


def write(folder: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def size(png: Path) -> tuple[int, int]:
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@pytest.mark.parametrize(
    "rows",
    [
        [training(1)],
        [*(training(step) for step in range(1, 100)), evaluation(50), evaluation(99)],
        [training(step, layers=1, experts=1) for step in range(1, 4)],
        [training(1) | {"tokens_per_expert": [[0, 0], [0, 0]], "max_violation": 0.0}],
        [training(1, loss=float("nan")), training(2)],
    ],
    ids=["one step", "long", "one layer and expert", "no token", "not finite"],
)
def test_a_sparse_run_is_drawn(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    plot_run(write(tmp_path, rows), tmp_path / "report.png")
    width, height = size(tmp_path / "report.png")
    assert width > height > 900


def test_one_number_that_is_not_finite_does_not_hide_the_rest(tmp_path: Path) -> None:
    values = [float(step) for step in range(100)]
    values[40] = float("nan")
    smoothed = plot._smooth(values)
    assert smoothed[0] == 0.0
    assert smoothed[20] == pytest.approx(20.0)
    assert smoothed[80] == pytest.approx(80.0)


def test_a_dense_run_gets_the_loss_alone(tmp_path: Path) -> None:
    plot_run(write(tmp_path, [training(step, layers=0) for step in range(1, 9)]), tmp_path / "report.png")
    width, height = size(tmp_path / "report.png")
    assert width > 2 * height


def test_a_step_done_again_after_a_resume_counts_as_it_was_done_last(tmp_path: Path) -> None:
    rows = [training(step, loss=1.0) for step in (1, 2, 3)] + [training(step, loss=2.0) for step in (2, 3, 4)]
    assert read(write(tmp_path, rows)).column("loss") == ([1, 2, 3, 4], [1.0, 2.0, 2.0, 2.0])


def test_a_torn_last_line_is_passed_over_and_another_one_is_not(tmp_path: Path) -> None:
    path = write(tmp_path, [training(1), evaluation(1)], tail='{"step": 2, "lo')
    records = read(path)
    assert (len(records.training), len(records.evaluation)) == (1, 1)
    path.write_text('{"step": 2, "lo\n' + json.dumps(training(3)))
    with pytest.raises(CheckpointError, match=r"line 1, is not a record"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("", "no training step yet"), ("[1]\n[2]\n", "line 1, is not a record")],
)
def test_a_run_without_records_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        plot_run(tmp_path / "metrics.jsonl", tmp_path / "report.png")


def test_the_command_draws_into_the_run_or_where_it_is_told(tmp_path: Path) -> None:
    write(tmp_path / "run", [training(1), training(2)])
    done = CliRunner().invoke(command, [str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run/report.png").is_file()
    done = CliRunner().invoke(command, [str(tmp_path / "run"), "--png", str(tmp_path / "other.png")])
    assert (tmp_path / "other.png").is_file()


def test_the_command_says_what_is_wrong_in_one_message(tmp_path: Path) -> None:
    write(tmp_path / "run", [training(1)])
    for arguments, message in (
        ([str(tmp_path / "none")], "is no folder"),
        ([str(tmp_path)], "metrics.jsonl cannot be read"),
        ([str(tmp_path / "run"), "--png", str(tmp_path / "none/a.png")], "Choose another --png"),
    ):
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == 2
        assert message in done.output
        assert "Traceback" not in done.output


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    heavy = "{'torch', 'transformers', 'matplotlib', 'numpy', 'safetensors', 'tokenizers'}"
    code = (
        "import sys, moe.export, moe.generate, moe.report, moe.report.plot, moe.hf.families\n"
        f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
