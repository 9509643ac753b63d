import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moe import evaluate
from moe.errors import CheckpointError
from moe.records import read
from moe.report import command, layers, line
from moe.report.loads import Loads
from moe.report.plot import plot_run
from moe.sparse.health import DEAD_AFTER_STEPS


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


def healthy(step: int, *, layers: int = 2, dead: int = 0, **more: float) -> dict[str, Any]:
    """A record as it is written now; `training` is one of an older version."""
    names = ("max_violation", "load_entropy", "router_entropy", "token_entropy", "logit_rms", "logit_max")
    per_layer = {name: [0.5 + layer / step for layer in range(layers)] for name in names}
    per_layer |= {name: [value] * layers for name, value in more.items()}
    counts = {"steps_since_use": [step] * layers, "dead_experts": [dead] * layers}
    return training(step, layers=layers) | {"per_layer": per_layer | counts}


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


@pytest.mark.parametrize(
    "rows",
    [
        [healthy(1)],
        [healthy(step, layers=12, dropped=0.1, logit_max=float("nan")) for step in range(1, 90)],
        [training(1), healthy(2), healthy(3), training(4)],
    ],
    ids=["one step", "many layers, long, not finite", "begun by an older version"],
)
def test_the_health_of_layers_is_drawn(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    plot_run(write(tmp_path, rows), tmp_path / "report.png")
    width, height = size(tmp_path / "report.png")
    assert height > width  # two rows of panels more than without


def test_panels_are_drawn_for_what_there_is(tmp_path: Path) -> None:
    def titles(*rows: dict[str, Any]) -> list[str]:
        from matplotlib.figure import Figure

        records, found = read(write(tmp_path, list(rows))), []
        for draw in layers.panels(records):
            axes = Figure().add_subplot()
            draw(axes)
            found.append(axes.get_title(loc="left") or axes.get_title())
        return found

    always = [
        "Entropy of the load",
        "Entropy of the mean probabilities",
        "Entropy of a token's probabilities",
    ]
    always += ["Router logits", "Largest router logit", "Longest unused expert"]
    dead = f"Dead experts (no token for {DEAD_AFTER_STEPS} steps)"
    assert titles(training(1)) == []
    assert titles(healthy(1)) == always
    assert titles(healthy(1), healthy(2, dead=1)) == [*always, dead]
    assert titles(healthy(1, dropped=0.0)) == [*always, "Dropped choices"]
    assert titles(healthy(1, bias_min=-0.1, bias_max=0.2)) == [*always, "Selection bias"]


def test_the_map_of_the_run_holds_every_expert_at_every_time(tmp_path: Path) -> None:
    rows = [training(step) | {"tokens_per_expert": [[step, 0], [1, 3]]} for step in range(1, 1001)]
    loads = Loads.of(read(write(tmp_path, rows)))
    assert loads is not None
    assert loads.history_NLE.shape[1:] == (2, 2)
    assert len(loads.history_NLE) <= 240
    assert loads.history_NLE[0].tolist() == loads.history_NLE[-1].tolist() == [[2.0, 0.0], [0.5, 1.5]]
    assert loads.latest_LE.tolist() == [[2.0, 0.0], [0.5, 1.5]]
    assert (loads.first_step, loads.last_step, loads.averaged) == (1, 1000, 50)


def test_a_peak_survives_the_smoothing_of_maxima() -> None:
    values = [1.0] * 300
    values[150] = 9.0
    assert line.largest(values).max() == 9.0
    assert line.largest(values)[[0, 140, 160, 299]].tolist() == [1.0] * 4
    assert len(line.largest(values)) == 300


def test_one_number_that_is_not_finite_does_not_hide_the_rest(tmp_path: Path) -> None:
    values = [float(step) for step in range(100)]
    values[40] = float("nan")
    smoothed = line.mean(values)
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
    (tmp_path / "folder.png").mkdir()
    for arguments, message in (
        ([str(tmp_path / "none")], "is no folder"),
        ([str(tmp_path)], "metrics.jsonl cannot be read"),
        ([str(tmp_path / "run"), "--png", str(tmp_path / "none/a.png")], "Choose another --png"),
        ([str(tmp_path / "run"), "--png", str(tmp_path / "x.txt")], "must end with .png, for example"),
        ([str(tmp_path / "run"), "--png", str(tmp_path / "png")], "must end with .png"),
        ([str(tmp_path / "run"), "--png", ""], "must end with .png"),
        ([str(tmp_path / "run"), "--png", str(tmp_path / "folder.png")], "Is a directory"),
    ):
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == 2
        assert message in done.output
        assert "Traceback" not in done.output
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder.png", "metrics.jsonl", "run"]


def test_a_picture_that_cannot_be_written_whole_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "report.png").write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        plot_run(write(tmp_path, [training(1)]), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.png"]


# `turnout evaluate --json` asks the same of its target.


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no/such/dir/y.json", "No such file or directory"),
        ("run", "which is a folder"),
        ("y" * 300, "File name too long"),
    ],
)
def test_figures_without_a_place_are_refused_before_the_work(
    target: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("it began"))
    done = CliRunner().invoke(evaluate.command, [str(tmp_path / "run"), "--json", str(tmp_path / target)])
    assert (done.exit_code, done.stderr.count("error: ")) == (2, 1)
    assert message in done.stderr


def test_figures_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = evaluate.Evaluation(1, 2.0, 3.0, 4.0, 5, 6)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: figures)
    page = tmp_path / "y.json"
    done = CliRunner().invoke(evaluate.command, [str(tmp_path), "--json", str(page)])
    assert done.exit_code == 0, done.output
    assert json.loads(page.read_text()) == dataclasses.asdict(figures)

    def full(self: Path, text: str, **_: object) -> None:
        self.write_bytes(text.encode()[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    old = page.read_text()
    monkeypatch.setattr(Path, "write_text", full)
    done = CliRunner().invoke(evaluate.command, [str(tmp_path), "--json", str(page)])
    assert (done.exit_code, "No space left on device" in done.stderr) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["y.json"]
    assert page.read_text() == old


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    heavy = "{'torch', 'transformers', 'matplotlib', 'numpy', 'safetensors', 'tokenizers'}"
    code = (
        "import sys, moe.export, moe.generate, moe.report, moe.report.plot, moe.hf.families\n"
        f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
