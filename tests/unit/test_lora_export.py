"""Adapters of every family: merged into stock models, and as peft loads them, with the logits of the adapted model."""

import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from moe.checkpoint.read import SavedModel
from moe.config import ModelConfig, RunConfig
from moe.errors import ExportError
from moe.export import command, export, export_adapter
from moe.hf import write
from moe.hf.convert import Move, moves
from moe.hf.family import Family
from moe.hf.match import family_of
from moe.model import Transformer
from moe.model.lora import adapt
from tests.stock import CASES, Saved, model, random_weights, run_of, write_run
from tests.unit.corpus import refused

RANK, ALPHA = 3, 7.5
HOMELESS = {"gpt_oss", "granitemoeshared"}
"""Families of which peft cannot be told all: transposed experts, two matrices in one."""


def _targets(config: ModelConfig) -> list[str]:
    found = ["attention"]
    if config.moe is not None:
        found.append("experts")
        found += ["shared_expert"] if config.moe.shared_expert_intermediate_size else []
    return found + (["dense"] if len(config.sparse_layers) < config.num_layers else [])


def _adapted(config: ModelConfig, targets: list[str] | None = None) -> tuple[RunConfig, Transformer]:
    """A recipe, and its model with every weight and adapter drawn."""
    lora = {"rank": RANK, "alpha": ALPHA, "targets": targets or _targets(config)}
    page = run_of(config).model_dump()
    page["balance"]["bias_update_rate"] = 0.0
    run = RunConfig.model_validate({**page, "lora": lora})
    transformer = adapt(Transformer(config), run.lora)
    drawn, draw = random_weights(config), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in (*transformer.named_parameters(), *transformer.named_buffers()):
            if "_lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
            else:
                parameter.copy_(drawn[name])
    return run, transformer.eval()


def _saved(folder: Path, run: RunConfig, transformer: Transformer) -> Path:
    tied = "embed.weight" if run.model.tie_embeddings else None
    names = {name: p.detach() for name, p in (*transformer.named_parameters(), *transformer.named_buffers())}
    if tied is not None and tied not in names:
        names = {tied: transformer.embed.weight.detach(), **names}
    return write_run(folder, Saved(run, names))


def _base(folder: Path, home: Path) -> Path:
    """The frozen model alone, as stock code has it."""
    saved = SavedModel.open(home)
    folder.mkdir()
    write.write(folder, saved.run, saved.step, saved.names(), saved.stored, home / "tokenizer")
    return folder


def _stock(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()


def _ids(config: ModelConfig) -> Tensor:
    return torch.randint(config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))


def _same(found: Tensor, expected: Tensor, within: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= within * expected.abs().max())


QUICK = ("qwen3_moe", "mixtral", "llama", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_merged_and_by_peft_a_stock_model_gives_the_adapted_logits(case: str, tmp_path: Path) -> None:
    _, config = CASES[case]
    run, transformer = _adapted(config)
    home, ids_BS = _saved(tmp_path / "run", run, transformer), _ids(config)
    with torch.no_grad():
        ours = transformer(ids_BS)
        merged = _stock(Path(export(home, tmp_path / "merged", verify=case == "qwen3_moe").folder))
        assert _same(merged(ids_BS).logits, ours)
        base = _stock(_base(tmp_path / "base", home))
        assert not _same(base(ids_BS).logits, ours, within=0.1)
        if family_of(config).model_type in HOMELESS:
            with pytest.raises(ExportError, match="Export the merged model, without --adapter"):
                export_adapter(home, tmp_path / "adapter")
            assert not (tmp_path / "adapter").exists()
            return
        written = export_adapter(home, tmp_path / "adapter")
        by_peft = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert _same(by_peft(ids_BS).logits, ours)
        on_disk = load_file(tmp_path / "adapter/adapter_model.safetensors")
        loaded = peft.get_peft_model_state_dict(by_peft)
        assert loaded.keys() == on_disk.keys()
        assert all(torch.equal(loaded[key], on_disk[key]) for key in loaded)
        numbers = sum(p.numel() for name, p in by_peft.named_parameters() if "lora_" in name)
        assert numbers == sum(written.trained_by_target.values())
        assert _same(by_peft.merge_and_unload()(ids_BS).logits, ours)


def test_the_merge_is_w_and_scale_b_a_of_each_expert_and_nothing_else(tmp_path: Path) -> None:
    run, transformer = _adapted(model(moe={}))
    saved = SavedModel.open(_saved(tmp_path / "run", run, transformer))
    weights = dict(transformer.named_parameters())
    assert not [name for name in saved.names() if "lora" in name]
    for name in saved.names():
        found = list(saved.pieces(name))
        found_whole = torch.stack(found) if ".experts." in name else found[0]
        expected = weights[name]
        if f"{name}_lora_a" in weights:
            product = weights[f"{name}_lora_b"] @ weights[f"{name}_lora_a"]
            expected = expected + ALPHA / RANK * product
            assert not torch.equal(found_whole, weights[name])
        torch.testing.assert_close(found_whole, expected.detach(), rtol=1e-6, atol=1e-6)


def test_only_targets_are_named_for_peft_and_counted(tmp_path: Path) -> None:
    config = model(moe={"first_k_dense": 1})
    run, transformer = _adapted(config, ["experts"])
    home = _saved(tmp_path / "run", run, transformer)
    result = export_adapter(home, tmp_path / "adapter", dtype="bf16", base="somebody/base")
    page = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert page["target_modules"] == []
    assert page["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert (page["r"], page["lora_alpha"], page["base_model_name_or_path"]) == (RANK, ALPHA, "somebody/base")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert sum(t.numel() for t in tensors.values()) == result.trained_by_target["experts"]
    assert "somebody/base" in (tmp_path / "adapter/README.md").read_text()
    assert (tmp_path / "adapter/tokenizer.json").is_file()


def test_the_command_writes_either_and_says_what_was_trained(tmp_path: Path) -> None:
    run, transformer = _adapted(model(moe={}))
    home = str(_saved(tmp_path / "run", run, transformer))
    invoke = CliRunner().invoke
    merged = invoke(command, [home, "--to", str(tmp_path / "m"), "--json", str(tmp_path / "m.json")])
    assert merged.exit_code == 0, merged.output
    alone = invoke(
        command, [home, "--to", str(tmp_path / "a"), "--adapter", "--json", str(tmp_path / "a.json")]
    )
    assert alone.exit_code == 0, alone.output
    for name, result in (("m", merged), ("a", alone)):
        counts = json.loads((tmp_path / f"{name}.json").read_text())["trained_by_target"]
        assert counts.keys() == {"attention", "experts"}
        assert (
            f"{sum(counts.values()):,} trained parameters (attention {counts['attention']:,}" in result.output
        )
    arguments = [home, "--to", str(tmp_path / "b")]
    refused(invoke(command, [*arguments, "--base", "x"]), "--base has no effect", "--adapter")
    refused(invoke(command, [*arguments, "--adapter", "--verify"]), "--verify has no effect")
    refused(
        invoke(command, [*arguments, "--adapter", "--max-shard-size", "1GB"]),
        "--max-shard-size has no effect",
    )
    assert not (tmp_path / "b").exists()


def test_a_run_without_adapters_has_none_to_write(tmp_path: Path) -> None:
    config = model(moe={})
    home = write_run(tmp_path / "run", Saved(run_of(config), random_weights(config)))
    with pytest.raises(ExportError, match="trained without lora"):
        export_adapter(home, tmp_path / "adapter")


def test_a_conversion_that_peft_cannot_be_told_of_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, transformer = _adapted(model(moe={}))
    home = _saved(tmp_path / "run", run, transformer)

    class Transposed(Move):
        def split(self, number: int, piece: Tensor) -> Any:
            return super().split(number, piece if self.stacked else piece.flip(-1))

    def turned(family: Family, config: ModelConfig) -> list[Move]:
        return [Transposed(**vars(move)) for move in moves(family, config)]

    monkeypatch.setattr("moe.hf.adapter.moves", turned)
    with pytest.raises(ExportError, match="cannot be said in peft's format"):
        export_adapter(home, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_rows_that_a_conversion_reorders_are_reordered_in_b(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, transformer = _adapted(model(moe={}))
    home = _saved(tmp_path / "run", run, transformer)
    export_adapter(home, tmp_path / "plain")

    class Reversed(Move):
        def split(self, number: int, piece: Tensor) -> Any:
            return super().split(number, piece if self.stacked else piece.flip(0))

    monkeypatch.setattr("moe.hf.adapter.moves", lambda f, c: [Reversed(**vars(move)) for move in moves(f, c)])
    export_adapter(home, tmp_path / "reversed")
    plain, turned = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "reversed")
    )
    for key, tensor in plain.items():
        expected = tensor.flip(0) if "self_attn" in key and "lora_B" in key else tensor
        assert torch.equal(turned[key], expected), key
