"""A Hugging Face folder comes in as a native one, bit for bit, a piece at a time, and a run can begin with either."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"

from moe.checkpoint.identity import check as check_identity
from moe.config import ModelConfig, RunConfig
from moe.errors import CheckpointError, ConfigError, DataError, ExportError
from moe.export import command as export_command
from moe.export import export
from moe.hf import origin
from moe.hf.beginning import begin, check_model, check_tokenizer
from moe.hf.native import NativeFolder, stored
from moe.hf.source import open_weights
from moe.ingest import command, ingest
from moe.recipe import dump
from moe.train import preflight
from tests.stock import CASES, saved, write_run, write_tokenizer
from tests.unit import corpus
from tests.unit.test_export_stream import LAYER, MEASURED, _large_run


def _hf(folder: Path, case: str, **options: Any) -> Path:
    """The case as a Hugging Face folder."""
    export(write_run(folder / "run", saved(CASES[case][1])), folder / "hf", **options)
    return folder / "hf"


def _import(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _hf(tmp_path_factory.mktemp("hf"), "qwen3_moe, first layers dense, tied", max_shard_size=20_000)


@pytest.fixture(scope="module")
def native(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("native") / "folder"
    ingest(hf, target, max_shard_size=20_000)
    return target


@pytest.fixture
def copied(native: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(native, tmp_path / "copied"))


@pytest.mark.parametrize("case", CASES)
def test_every_weight_arrives_bit_for_bit(case: str, tmp_path: Path) -> None:
    source, folder = saved(CASES[case][1]), tmp_path / "native"
    ingest(_hf(tmp_path, case, max_shard_size=30_000), folder, max_shard_size=30_000)
    opened = open_weights(folder)
    assert isinstance(opened, NativeFolder)
    check_model(opened.model, source.run.model, "the source")
    assert sorted(opened.names()) == sorted(source.names())
    for name in source.names():
        pairs = zip(opened.pieces(name), source.pieces(name), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), name
    again = tmp_path / "again"
    done = CliRunner().invoke(export_command, [str(folder), "--to", str(again), "--max-shard-size", "30KB"])
    assert done.exit_code == 0, done.output
    ours, theirs = ({f.name: load_file(f) for f in d.glob("*.safetensors")} for d in (again, tmp_path / "hf"))
    assert ours.keys() == theirs.keys()
    for file in theirs:
        assert all(torch.equal(ours[file][key], tensor) for key, tensor in theirs[file].items())


def test_each_expert_stands_by_itself_and_is_read_alone(native: Path) -> None:
    opened = NativeFolder.open(native)
    name = "layers.2.ffn.experts.gate_up"
    keys = [key for file in native.glob("*.safetensors") for key in load_file(file)]
    assert sorted(key for key in keys if "gate_up" in key) == [
        f"layers.2.ffn.experts.{expert}.gate_up" for expert in range(5)
    ]
    every = list(opened.pieces(name))
    for expert, piece in zip(range(3, 5), opened.pieces(name, range(3, 5)), strict=True):
        assert torch.equal(piece, every[expert])


def test_an_import_is_verified_against_stock_transformers(hf: Path, tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        out, page = tmp_path / dtype, tmp_path / f"{dtype}.json"
        done = _import(hf, "--to", out, "--verify", "--dtype", dtype, "--json", page)
        assert done.exit_code == 0, done.output
        assert "gives the same logits at 192 positions" in done.stdout
        compared = json.loads(page.read_text())["comparison"]
        assert compared["max_difference"] < 1e-5 * compared["logit_scale"]
        assert compared["wrong_keys"] == []
        assert compared["logit_scale"] > 0.5
    sizes = [sum(f.stat().st_size for f in (tmp_path / d).glob("*.safetensors")) for d in ("fp32", "bf16")]
    assert sizes[1] < 0.6 * sizes[0]


def test_an_import_that_differs_from_its_source_does_not_appear(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = NativeFolder.pieces

    def wrong(self: NativeFolder, name: str, only: range | None = None) -> Any:
        pieces = read(self, name, only)
        return (piece * 1.01 for piece in pieces) if "attention.key" in name else pieces

    monkeypatch.setattr(NativeFolder, "pieces", wrong)
    with pytest.raises(ExportError, match=r"differs from the imported model .* nothing was imported"):
        ingest(hf, tmp_path / "out", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_selection_biases_of_deepseek_stay_float32(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(2)
    config = transformers.DeepseekV3Config(
        vocab_size=112,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=64,
        num_nextn_predict_layers=0,
        initializer_range=0.1,
    )
    theirs = transformers.DeepseekV3ForCausalLM(config)
    for layer in theirs.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.linspace(-0.3001, 0.2002, 8))
    theirs.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    ingest(tmp_path / "hf", tmp_path / "native", dtype="bf16", verify=True)
    tensors = load_file(tmp_path / "native/model.safetensors")
    biases = {key: tensor for key, tensor in tensors.items() if "selection_bias" in key}
    assert len(biases) == 2
    for tensor in biases.values():
        assert torch.equal(tensor, torch.linspace(-0.3001, 0.2002, 8))
    assert {t.dtype for key, t in tensors.items() if key not in biases} == {torch.bfloat16}


def test_what_lies_beside_the_weights_comes_along(hf: Path, native: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (native / name).read_bytes() == (hf / name).read_bytes()
    page = json.loads((native / "config.json").read_text())
    assert page["model_type"] == "turnout"
    assert (page["vocab_size"], page["num_hidden_layers"], page["eos_token_id"]) == (112, 3, 96)
    generation = json.loads((native / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"], generation["use_cache"]) == (
        96,
        96,
        False,
    )
    assert f"`{hf}`" in (native / "README.md").read_text()


def test_the_model_section_is_printed_and_written_ready_to_paste(hf: Path, native: Path) -> None:
    printed = _import(hf)
    assert printed.exit_code == 0
    assert printed.stdout == (native / "model.yaml").read_text()
    section = yaml.safe_load(printed.stdout)["model"]
    assert ModelConfig.model_validate(section) == open_weights(hf).model
    useless = _import(hf, "--verify")
    assert (useless.exit_code, "nothing is written without --to" in useless.stderr) == (2, True)


def test_a_folder_without_a_tokenizer_is_imported_with_a_warning(hf: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(hf, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    assert not ingest(bare, tmp_path / "native").tokenizer
    assert not list((tmp_path / "native").glob("tokenizer*"))


def test_what_cannot_be_imported_is_refused(hf: Path, native: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "empty", "there is no config.json"),
        (tmp_path / "none" / "at" / "all", "no folder, nor a name on the Hub"),
        ("org/model", "the Hub does not give it"),
        (native, "is imported already"),
    ):
        done = _import(source, "--to", tmp_path / "out")
        assert (done.exit_code, message in done.stderr, done.stderr.count("error: ")) == (2, True, 1), (
            done.stderr
        )
    done = _import(hf, "--to", native)
    assert (done.exit_code, "never overwrites" in done.stderr) == (2, True)
    broken = Path(shutil.copytree(hf, tmp_path / "broken"))
    file = next(broken.glob("model-00001*"))
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    done = _import(broken, "--to", tmp_path / "out")
    assert (done.exit_code, "not finite" in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_name_on_the_hub_is_fetched_through_the_usual_cache(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(hf)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    result = ingest("org/model", tmp_path / "native")
    assert (asked["name"], result.source) == ("org/model", "org/model")
    wanted = lambda name: list(  # noqa: E731
        huggingface_hub.utils.filter_repo_objects(
            [name], allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
        )
    )
    for name in (path.name for path in hf.iterdir() if path.name != "README.md"):
        assert wanted(name), name
    for name in ("pytorch_model.bin", "original/model.safetensors", "model.gguf", "README.md"):
        assert not wanted(name), name
    assert origin.resolve("org/model") == hf


def test_a_native_folder_that_is_not_whole_is_refused(copied: Path) -> None:
    file = next(copied.glob("model-00001*"))
    tensors, config = load_file(file), json.loads((copied / "config.json").read_text())
    key = next(iter(tensors))

    def refused(words: str, changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            open_weights(copied)
        save_file(tensors, file, {"format": "pt"})

    refused(f"says that {key} is in", {k: t for k, t in tensors.items() if k != key})
    refused("stray", {**tensors, "stray": torch.zeros(2)})
    refused(f"{key} has shape", {**tensors, key: tensors[key][:-1].clone()})
    for change, words in (
        ({"version": 2}, "reads 1"),
        ({"version": 1, "model": {**config["turnout"]["model"], "warp": 9}}, "there is no such setting"),
    ):
        (copied / "config.json").write_text(json.dumps({**config, "turnout": change}))
        with pytest.raises(CheckpointError, match=words):
            open_weights(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_weights(copied)


def test_the_names_of_a_native_folder_are_those_of_the_model() -> None:
    for _, config in CASES.values():
        plan = stored(config)
        keys = [key for tensor in plan for key in tensor.keys]
        assert len(set(keys)) == len(keys)
        assert {tensor.name for tensor in plan} == set(saved(config).names())


MEASURE = """
import sys
from pathlib import Path
from moe.ingest import ingest

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def growth(work):
    Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
    before = status("VmRSS")
    work()
    return status("VmHWM") - before

small, large, out = map(Path, sys.argv[1:4])
ingest(small, out / "small")  # imports count for nobody
for dtype in ("fp32", "bf16"):
    print(growth(lambda: ingest(large, out / dtype, dtype=dtype, max_shard_size=150 * 10**6)))
print(growth(lambda: bytearray(10**8)))  # the control: what is held is seen
"""


@pytest.mark.slow
def test_an_import_holds_less_than_one_layer(hf: Path, tmp_path: Path) -> None:
    export(_large_run(tmp_path / "run"), tmp_path / "large", max_shard_size=150 * 10**6)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, hf, tmp_path / "large", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=MEASURED,
    )
    assert done.returncode == 0, done.stderr
    fp32, bf16, control = map(int, done.stdout.split())
    assert control > 0.9e8
    assert max(fp32, bf16) < LAYER / 2
    assert len(list((tmp_path / "out/fp32").glob("*.safetensors"))) == 3
    ours, theirs = open_weights(tmp_path / "out/fp32"), open_weights(tmp_path / "large")
    for name in ours.names():
        assert all(torch.equal(*pair) for pair in zip(ours.pieces(name), theirs.pieces(name), strict=True)), (
            name
        )


# ---- init_from


def _page(source: Path, data: Path, folder: Path, **model: Any) -> dict[str, Any]:
    section = open_weights(source).model.model_dump(mode="json")
    return {
        "name": "further",
        "run_dir": str(folder),
        "init_from": str(source),
        "model": {**section, **model},
        "data": {"path": str(data), "sequence_length": 16},
        "train": {
            "steps": 2,
            "global_batch_size": 2,
            "micro_batch_size": 2,
            "precision": "fp32",
            "optimizer": {"learning_rate": 1e-3},
        },
    }


@pytest.fixture(scope="module")
def data(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text prepared with the imported tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus.TEXTS))
    sources = [{"type": "jsonl", "paths": [str(folder / "texts.jsonl")]}]
    corpus.prepared(folder, sources, tokenizer={"type": "file", "path": str(native)})
    return folder / corpus.PREPARED


def test_the_data_can_be_prepared_with_the_imported_tokenizer(native: Path, data: Path) -> None:
    assert (data / "tokenizer/tokenizer.json").read_bytes() == (native / "tokenizer.json").read_bytes()


def test_a_recipe_is_compared_with_what_it_begins_with_before_ranks_start(
    hf: Path, native: Path, data: Path, tmp_path: Path
) -> None:
    for source in (hf, native):
        free = {"init_std": 0.5, "max_sequence_length": 48}
        preflight(RunConfig.model_validate(_page(source, data, tmp_path / "run", **free)), 1)
        run = RunConfig.model_validate(_page(source, data, tmp_path / "run", norm_eps=1e-3))
        with pytest.raises(
            ConfigError, match=r"model\.norm_eps is 0\.001, but the model in init_from, .* has 3e-05"
        ):
            preflight(run, 1)
    run = RunConfig.model_validate(
        _page(native, data, tmp_path / "run") | {"init_from": str(tmp_path / "none")}
    )
    with pytest.raises(CheckpointError, match=r"init_from: .*none holds no model"):
        preflight(run, 1)


def test_a_tokenizer_that_reads_ids_otherwise_is_refused(native: Path, tmp_path: Path) -> None:
    other = write_tokenizer(tmp_path / "other")
    check_tokenizer(other, str(native))
    page = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(page))  # other bytes, the same ids
    check_tokenizer(other, str(native))
    vocabulary = page["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(page))
    with pytest.raises(DataError, match=r"tokenizer\.type=file and tokenizer\.path="):
        check_tokenizer(other, str(native))


def test_a_run_is_one_with_what_it_began_with(native: Path, data: Path, tmp_path: Path) -> None:
    run = RunConfig.model_validate(_page(native, data, tmp_path / "run"))
    run.folder.mkdir()
    (run.folder / "recipe.yaml").write_text(dump(run))
    assert check_identity(run, "") is None
    for other in (None, str(tmp_path)):
        with pytest.raises(CheckpointError, match=r"init_from was .*native.* and is"):
            check_identity(run.model_copy(update={"init_from": other}), "")


@pytest.mark.slow
def test_a_run_begins_with_an_import_goes_on_without_it_and_is_one_to_begin_with(
    native: Path, data: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(native, tmp_path / "source"))
    recipe = tmp_path / "recipe.yaml"

    def train(page: dict[str, Any]) -> str:
        recipe.write_text(yaml.safe_dump(page))
        done = subprocess.run(
            [sys.executable, "-m", "moe.train", str(recipe)],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    page = _page(source, data, tmp_path / "run")
    # A rate of next to nothing: what is saved is what it began with.
    page["train"]["optimizer"] |= {"learning_rate": 1e-12, "weight_decay": 0.0}
    assert f"beginning with the weights of {source}" in train(page)
    ours, theirs = (open_weights(folder) for folder in (tmp_path / "run", native))
    for name in theirs.names():
        pairs = zip(ours.pieces(name), theirs.pieces(name), strict=True)
        assert all(torch.allclose(*pair, rtol=0, atol=1e-9) for pair in pairs), name
    shutil.rmtree(source)
    page["train"]["steps"] = 4
    assert "going on from step 2" in train(page)
    # And a run is something to begin with.
    page |= {"init_from": str(tmp_path / "run"), "run_dir": str(tmp_path / "third")}
    weights = begin(RunConfig.model_validate(page), verify=True)
    assert weights is not None
    assert all(torch.equal(*pair) for pair in zip(weights.pieces(name), ours.pieces(name), strict=True))
    assert preflight(RunConfig.model_validate(page), 1).num_tokens("train")
