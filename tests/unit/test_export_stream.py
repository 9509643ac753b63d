"""An export holds one piece of one layer at a time, and says the same as one that holds all."""

import dataclasses
import errno
import json
import os
import struct
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe import export
from moe.checkpoint.read import SavedModel
from moe.checkpoint.unmapped import TensorFile
from moe.config import ModelConfig
from moe.errors import CheckpointError, ExportError
from moe.hf.convert import disk_tensors, moves
from moe.hf.match import family_of
from moe.hf.stream import write_tensors
from moe.hf.verify import our_logits
from moe.model import Transformer
from tests.stock import CASES, Saved, finish_run, model, run_of, saved, write_run

LARGE = model(
    vocab_size=1000,
    hidden_size=1024,
    num_layers=10,
    attention={"num_heads": 4, "num_kv_heads": 2},
    moe={"num_experts": 8, "top_k": 2, "expert_intermediate_size": 320},
)
"""Layers of 8 experts of 3.9 MB, 31 MB together; 320 MB in all."""
EXPERT = 3 * 1024 * 320 * 4
LAYER = 8 * EXPERT

MEASURED = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
"""What is freed goes back at once: what is held is to be measured, not what glibc keeps of it."""

MEASURE = """
import sys
from pathlib import Path
from moe.checkpoint.read import SavedModel
from moe.export import export
from moe.hf.verify import our_logits
import torch

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def growth(work):
    Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
    before = status("VmRSS")
    work()
    return status("VmHWM") - before

def logits(run):
    saved = SavedModel.open(run)
    return our_logits(saved.run.model, saved.pieces, torch.arange(32)[None])

small, large, out = map(Path, sys.argv[1:4])
export(small, out / "small")  # imports count for nobody
logits(small)
for dtype in ("fp32", "bf16"):
    print(growth(lambda: export(large, out / dtype, dtype=dtype, max_shard_size=150 * 10**6)))
print(growth(lambda: logits(large)))
print(growth(lambda: bytearray(10**8)))  # the control: what is held is seen
"""


def _all(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {key: (shape, dtype) for key, shape in shapes.items()}


def _large_run(folder: Path) -> Path:
    """A run whose every tensor holds its own number, made without holding them."""
    step = folder / "checkpoints/step_1"
    step.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {}
    for move in moves(family_of(LARGE), LARGE):
        for number in range(move.num_pieces):
            shapes[f"weight/{move.ours}" + (f"[{number}]" if move.stacked else "")] = move.piece_shape
    tensors = ((key, torch.full(shape, float(n))) for n, (key, shape) in enumerate(shapes.items()))
    write_tensors(step / "state.safetensors", _all(shapes, torch.float32), tensors)
    return finish_run(folder, run_of(LARGE), 1, shapes)


@pytest.mark.slow
def test_an_export_and_its_reference_hold_less_than_one_layer_more(tmp_path: Path) -> None:
    small, large = write_run(tmp_path / "small", saved(CASES["qwen3_moe"][1])), _large_run(tmp_path / "large")
    (state,) = large.rglob("state.safetensors")
    assert state.stat().st_size > 300e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small, large, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=MEASURED,
    )
    assert done.returncode == 0, done.stderr
    fp32, bf16, logits, control = map(int, done.stdout.split())
    assert control > 0.9e8
    assert max(fp32, bf16) < LAYER / 2
    # A layer, a matrix of the vocabulary's size, activations, and the piece that is being copied.
    assert logits < 2 * LAYER

    pages = [
        json.loads((tmp_path / f"out/{d}/model.safetensors.index.json").read_text()) for d in ("fp32", "bf16")
    ]
    assert [len(set(page["weight_map"].values())) for page in pages] == [3, 2]
    firsts = []
    for key, file in pages[0]["weight_map"].items():
        with safe_open(tmp_path / "out/fp32" / file, "pt") as opened:
            firsts.append((opened.get_slice(key)[:1].min().item(), opened.get_slice(key)[-1:].max().item()))
    assert all(first == last for first, last in firsts)
    # Gate and up come from one piece; all else is numbered in the order of the plan.
    assert list(dict.fromkeys(first for first, _ in firsts)) == [float(n) for n in range(len(set(firsts)))]


@pytest.mark.parametrize("config", [config for _, config in CASES.values()], ids=CASES)
def test_logits_layer_by_layer_are_those_of_the_whole_model(config: ModelConfig) -> None:
    source = saved(config)
    whole = Transformer(config).eval()
    ids_BS = torch.randint(config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, tensor in (*whole.named_parameters(), *whole.named_buffers()):
            tensor.copy_(source.weights[name])
        assert torch.equal(our_logits(config, source.pieces, ids_BS), whole(ids_BS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_piece_is_gone_before_the_next_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    config = CASES["qwen2_moe"][1]
    source, plan = saved(config), moves(family_of(config), config)
    read: list[weakref.ref[torch.Tensor]] = []

    def one_by_one(name: str) -> Iterator[torch.Tensor]:
        stacked = ".experts." in name
        for row in range(len(source.weights[name]) if stacked else 1):
            assert not [before for before in read if before() is not None], name
            piece = (source.weights[name][row] if stacked else source.weights[name]).clone()
            read.append(weakref.ref(piece))
            yield piece
            del piece

    shapes = {key: move.disk_shape for move in plan for key in move.disk}
    write_tensors(tmp_path / "x", _all(shapes, dtype), disk_tensors(plan, one_by_one))
    assert len(read) == sum(move.num_pieces for move in plan)


def test_the_reference_reads_each_part_when_its_turn_comes() -> None:
    config = CASES["qwen3_moe, first layers dense, tied"][1]
    source, asked = saved(config), []

    def read(name: str) -> Iterator[torch.Tensor]:
        asked.append(name.removeprefix("layers.").split(".")[0])
        return source.pieces(name)

    our_logits(config, read, torch.zeros(1, 4, dtype=torch.int64))
    assert list(dict.fromkeys(asked)) == ["embed", "0", "1", "2", "norm"]
    assert (asked[0], asked[-1]) == ("embed", "embed")  # the tied head reads it again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_file_is_one_that_safetensors_would_have_written(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7), "ключ": torch.randn(2, 3, 4)[:, 1:]}
    path = tmp_path / "x.safetensors"
    write_tensors(path, {k: (tuple(t.shape), dtype) for k, t in tensors.items()}, iter(tensors.items()))
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key].to(dtype)) for key in tensors)
    theirs = tmp_path / "theirs.safetensors"
    save_file(
        {key: t.to(dtype).contiguous() for key, t in tensors.items()}, theirs, metadata={"format": "pt"}
    )
    headers = []
    for file in (path, theirs):
        (length,) = struct.unpack("<Q", file.read_bytes()[:8])
        assert length % 8 == 0
        headers.append(json.loads(file.read_bytes()[8 : 8 + length]))
    for key in ("__metadata__", *tensors):
        ours, other = ({k: v for k, v in header[key].items() if k != "data_offsets"} for header in headers)
        assert ours == other


def test_tensors_that_come_as_nobody_planned_end_the_export(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a": (2,), "b": (3,)}
    a, b = torch.zeros(2), torch.zeros(3)
    for came, words in (
        ([("b", b), ("a", a)], r"b \[3\] came where a \[2\] was planned"),
        ([("a", a), ("b", a)], r"b \[2\] came where b \[3\] was planned"),
        ([("a", a)], r"nothing \[0\] came where b \[3\] was planned"),
    ):
        with pytest.raises(ExportError, match=words):
            write_tensors(tmp_path / "x", _all(shapes, torch.float32), iter(came))


def test_a_saved_model_reads_what_safetensors_reads(tmp_path: Path) -> None:
    source = saved(CASES["qwen2_moe"][1])
    opened = SavedModel.open(write_run(tmp_path / "run", source))
    assert sorted(opened.names()) == sorted(source.names())
    for name in source.names():
        pieces = list(opened.pieces(name))
        assert all(torch.equal(*pair) for pair in zip(pieces, source.pieces(name), strict=True))
    with pytest.raises(CheckpointError, match=r"has no parameter layers\.9\.ffn"):
        opened.pieces("layers.9.ffn")
    state = opened.folder / "state.safetensors"
    file = TensorFile(state)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"state\.safetensors cannot be read"):
        [file.read(key) for key in opened.manifest.tensors]


def test_the_result_page_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Saved = saved(CASES["llama"][1])
    run, page = write_run(tmp_path / "run", source), tmp_path / "result.json"
    page.write_text("old")

    def full(self: Path, text: str, **_: object) -> None:
        self.write_bytes(text.encode()[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    result = export.ExportResult("out", "Llama", 1, "fp32", 2, 3, 4, ("a",), None)
    monkeypatch.setattr(export, "export", lambda *_, **__: result)
    arguments = [str(run), "--to", str(tmp_path / "out"), "--json", str(page)]
    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_text", full)
        done = CliRunner().invoke(export.command, arguments)
    assert (done.exit_code, "No space left on device" in done.stderr) == (2, True)
    assert (page.read_text(), sorted(path.name for path in tmp_path.iterdir())) == (
        "old",
        ["result.json", "run"],
    )
    assert CliRunner().invoke(export.command, arguments).exit_code == 0
    assert json.loads(page.read_text()) == {**dataclasses.asdict(result), "weight_files": ["a"]}


@pytest.mark.parametrize("place", ["no/such/folder/x.json", "."])
def test_a_page_without_a_place_is_refused_before_the_work(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "export", lambda *_, **__: pytest.fail("it began"))
    arguments = [str(tmp_path), "--to", str(tmp_path / "out"), "--json", str(tmp_path / place)]
    done = CliRunner().invoke(export.command, arguments)
    assert (done.exit_code, done.stderr.count("error: ")) == (2, 1)
