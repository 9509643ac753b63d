import json
import os
import resource
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"

from moe.config import ModelConfig
from moe.errors import CheckpointError, ConfigError, ExportError
from moe.hf import compare
from moe.hf.card import Facts
from moe.hf.convert import disk_tensors, moves
from moe.hf.load import from_folder, from_run
from moe.hf.match import family_of
from moe.hf.pages import Dtype
from moe.hf.verify import TOLERANCE, Comparison, our_logits, save_reference, verify
from moe.hf.write import Written, new_folder, parse_size, write, write_model
from tests.stock import CASES, Saved, saved, write_tokenizer

ALL = pytest.mark.parametrize("config", [config for _, config in CASES.values()], ids=CASES)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for more, and threads on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("run") / "tokenizer")


def export(model: Saved, to: Path, tokenizer: Path, **choices: Any) -> Written:
    with new_folder(to) as folder:
        return write(folder, model.run, model.step, model.names(), model.pieces, tokenizer, **choices)


def stock(folder: Path, **choices: Any) -> Any:
    """The folder in stock code, every key accounted for."""
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **choices
    )
    found = [key for keys in loading.values() for key in keys]
    assert [key for key in found if not compare._of_prediction(key, model.config)] == []
    return model.eval()


def ids(config: ModelConfig, length: int = 40) -> torch.Tensor:
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


def difference(model: Any, config: ModelConfig, source: Saved) -> float:
    """Largest difference of logits relative to the largest logit."""
    ours = our_logits(config, source.pieces, ids(config))
    with torch.inference_mode():
        theirs = model(ids(config)).logits
    return float((ours - theirs).abs().max() / ours.abs().max())


def measured(folder: Path, config: ModelConfig, source: Saved, dtype: Dtype = "fp32") -> Comparison:
    """What `verify` finds, without a process of its own."""
    reference = folder.parent / "reference.safetensors"
    save_reference(reference, config, source.pieces, dtype)
    return Comparison(**compare.measure(folder, reference))


@ALL
def test_stock_code_loads_the_export_and_gives_our_logits(
    config: ModelConfig, tmp_path: Path, tokenizer: Path
) -> None:
    source = saved(config)
    export(source, tmp_path / "out", tokenizer)
    assert difference(stock(tmp_path / "out"), config, source) < TOLERANCE


@ALL
def test_a_run_becomes_the_same_stock_model_in_memory(config: ModelConfig, tokenizer: Path) -> None:
    source = saved(config)
    model, _ = from_run(source.run, source.names(), source.pieces, tokenizer)
    assert difference(model, config, source) < TOLERANCE


@ALL
def test_every_disk_name_is_written_once_with_its_rows(
    config: ModelConfig, tmp_path: Path, tokenizer: Path
) -> None:
    source = saved(config)
    written = export(source, tmp_path / "out", tokenizer, max_shard_size=6000)
    assert len(written.weight_files) > 3
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    expected = dict(disk_tensors(moves(family_of(config), config), source.pieces))
    found = {}
    for file in written.weight_files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for key in opened.keys():  # noqa: SIM118  not a mapping
                assert key not in found
                assert index["weight_map"][key] == file
                found[key] = opened.get_tensor(key)
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert written.num_bytes == index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert written.num_parameters == sum(m.numel for m in moves(family_of(config), config) if not m.copy)
    assert written.num_tensors == len(found)


def test_a_sharded_export_loads(tmp_path: Path, tokenizer: Path) -> None:
    config = CASES["qwen3_moe, first layers dense, tied"][1]
    source = saved(config)
    written = export(source, tmp_path / "out", tokenizer, max_shard_size=20_000)
    assert written.weight_files[0] == f"model-00001-of-{len(written.weight_files):05d}.safetensors"
    # One tensor may be above the limit; a file with several may not.
    for file in written.weight_files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert len(list(opened.keys())) == 1 or (tmp_path / "out" / file).stat().st_size < 22_000
    assert difference(stock(tmp_path / "out"), config, source) < TOLERANCE


def test_widths_that_the_fused_kernel_refuses_can_be_exported_and_verified(
    tmp_path: Path, tokenizer: Path
) -> None:
    config = CASES["qwen3_moe"][1]
    assert config.moe is not None
    odd = config.model_copy(
        update={"moe": config.moe.model_copy(update={"expert_intermediate_size": 7, "num_experts": 3})}
    )
    source = saved(odd)
    export(source, tmp_path / "out", tokenizer)
    assert measured(tmp_path / "out", odd, source).equal


def test_bf16_halves_the_bytes_and_keeps_the_rounded_weights(tmp_path: Path, tokenizer: Path) -> None:
    config = CASES["qwen2_moe"][1]
    source = saved(config)
    written = export(source, tmp_path / "out", tokenizer, dtype="bf16")
    assert written.num_bytes == 2 * written.num_parameters
    with safe_open(tmp_path / "out/model.safetensors", "pt") as opened:
        assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert measured(tmp_path / "out", config, source, "bf16").equal
    assert not measured(tmp_path / "out", config, source, "fp32").equal


def test_a_changed_weight_or_a_missing_one_is_not_equal(tmp_path: Path, tokenizer: Path) -> None:
    config = CASES["mixtral"][1]
    source = saved(config)
    export(source, tmp_path / "out", tokenizer)
    changed = source.weights["layers.2.ffn.experts.down"].clone()
    changed[3, 0, 0] += 0.01
    other = Saved(source.run, source.weights | {"layers.2.ffn.experts.down": changed})
    assert not measured(tmp_path / "out", config, other).equal
    weights = load_file(tmp_path / "out/model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    compared = measured(tmp_path / "out", config, source)
    assert compared.wrong_keys == ["model.norm.weight"]
    assert not compared.equal
    with pytest.raises(CheckpointError, match="lacks"):
        from_folder(tmp_path / "out")


def test_numbers_that_are_not_finite_are_not_equal() -> None:
    assert not Comparison(float("nan"), 1.0, float("nan"), 1, [], "5").equal
    assert not Comparison(float("inf"), float("inf"), 0.0, 1, [], "5").equal
    assert Comparison(0.0, 1.0, 0.0, 1, [], "5").equal


def test_verify_says_what_stock_code_said(tmp_path: Path, tokenizer: Path) -> None:
    config = CASES["mixtral"][1]
    source = saved(config)
    export(source, tmp_path / "out", tokenizer)
    (tmp_path / "out/model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ExportError, match="cannot load the export"):
        verify(tmp_path / "out", config, source.pieces, "fp32")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        from_folder(tmp_path / "out")


def test_the_folder_says_what_it_is(tmp_path: Path, tokenizer: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    config = CASES["qwen3_moe"][1]
    export(saved(config), tmp_path / "out", tokenizer)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == (96, 96, None)
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 96
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.decode(loaded("!abc")["input_ids"]) == "!abc"
    card = (tmp_path / "out/README.md").read_text()
    assert "12 steps, 3,072 tokens" in card
    assert "Qwen3MoeForCausalLM" in card
    assert "/secret/place" not in card
    assert "certificate" not in card
    facts = Facts("4f2e", {"step": 10, "validation_loss": 1.25, "bits_per_byte": 2.5}, "5 of 5 trainings")
    export(saved(config), tmp_path / "certified", tokenizer, facts=facts)
    card = (tmp_path / "certified/README.md").read_text()
    assert "| certificate | 5 of 5 trainings |" in card
    assert "| data | `corpus`, manifest `4f2e` |" in card
    assert "| evaluation | 2.5000 bits per byte, 1.2500 nats per token held out, at step 10 |" in card


def test_all_files_are_readable_by_those_the_umask_allows(tmp_path: Path, tokenizer: Path) -> None:
    old = os.umask(0o022)
    try:
        export(saved(CASES["llama"][1]), tmp_path / "out", tokenizer)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o644}, modes


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_an_existing_target_is_refused_and_left_alone(kind: str, tmp_path: Path, tokenizer: Path) -> None:
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
        (target / "precious").write_text("x")
    elif kind == "file":
        target.write_text("x")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="never overwrites"):
        export(saved(CASES["llama"][1]), target, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert kind != "folder" or (target / "precious").read_text() == "x"


def test_an_empty_folder_is_a_fine_target(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "out").mkdir()
    export(saved(CASES["llama"][1]), tmp_path / "out", tokenizer)
    assert (tmp_path / "out/config.json").is_file()


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="never overwrites"), new_folder(tmp_path / "out") as folder:  # noqa: PT012
        (folder / "a").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out/a").write_text("old")
    assert (tmp_path / "out/a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, ExportError])
def test_an_export_that_fails_half_way_leaves_nothing(
    error: type[BaseException], tmp_path: Path, tokenizer: Path
) -> None:
    source = saved(CASES["qwen3_moe"][1])

    def read(name: str) -> Iterator[torch.Tensor]:
        assert not (tmp_path / "out").exists()
        if name == "layers.2.ffn.experts.down":
            raise error
        return source.pieces(name)

    with pytest.raises(error), new_folder(tmp_path / "out") as folder:
        write(folder, source.run, source.step, source.names(), read, tokenizer, max_shard_size=20_000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_as_such_and_leaves_nothing(tmp_path: Path, tokenizer: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(ExportError, match=r"cannot be written .*File too large"):
            export(saved(CASES["mixtral"][1]), tmp_path / "out", tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert list(tmp_path.iterdir()) == []


def test_a_target_in_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="Choose another --to"), new_folder(tmp_path / "file" / "out"):
        pass


def test_a_model_is_written_without_a_run_with_the_tokenizer_of_another_models_folder(
    tmp_path: Path, tokenizer: Path
) -> None:
    config = CASES["mixtral"][1]
    source = saved(config)
    other = tmp_path / "other"
    export(saved(CASES["llama"][1]), other, tokenizer)
    (other / "additional_chat_templates").mkdir()
    (other / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    for name in ("chat_template.jinja", "model-00001-of-00002.safetensors", "pytorch_model.bin", ".hidden"):
        (other / name).write_text("x")
    with new_folder(tmp_path / "out") as folder:
        write_model(folder, config, source.names(), source.pieces, other, "# From elsewhere\n")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "additional_chat_templates",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (tmp_path / "out/README.md").read_text() == "# From elsewhere\n"
    assert difference(stock(tmp_path / "out"), config, source) < TOLERANCE


def test_a_missing_or_broken_tokenizer_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    source = saved(CASES["llama"][1])
    with pytest.raises(ExportError, match=r"tokenizer\.json is missing"):
        export(source, tmp_path / "out", tmp_path / "none")
    broken = write_tokenizer(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ExportError, match="cannot be read"):
        export(source, tmp_path / "out", broken)
    stranger = write_tokenizer(tmp_path / "stranger")
    (stranger / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    with pytest.raises(ExportError, match="'</s>' is not in the vocabulary"):
        export(source, tmp_path / "out", stranger)
    assert not (tmp_path / "out").exists()


def test_from_folder_gives_model_and_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    config = CASES["qwen2_moe"][1]
    source = saved(config)
    export(source, tmp_path / "out", tokenizer)
    model, loaded = from_folder(tmp_path / "out")
    assert difference(model, config, source) < TOLERANCE
    assert loaded.eos_token_id == 96


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("1.5MB", 1_500_000), ("2GiB", 2 << 30), ("700 kb", 700_000), ("64B", 64)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "0GB", "5TB", "five GB", "5iB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="for example 5GB"):
        parse_size(text)
