"""Our models in other people's hands: transformers' Auto classes, generate, the Trainer, lm-evaluation-harness."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors import safe_open

os.environ["HF_HUB_OFFLINE"] = "1"

from moe.errors import CheckpointError, ConfigError, ExportError
from moe.evaluate import command as evaluate_command
from moe.export import export
from moe.generate import command as generate_command
from moe.hf import from_pretrained, native_write, save_pretrained
from moe.hf.load import open_model
from moe.hf.native import NativeFolder
from moe.model import Transformer, initialize
from moe.model.source import Held
from tests.stock import CASES, model, saved, write_run, write_tokenizer

SIGMOID = model(
    moe={"router_score": "sigmoid", "selection_bias": True, "expert_bias": True, "num_experts": 8},
    tie_embeddings=True,
)
"""A model without a stock architecture of its switches."""
FAMILIES = ["qwen3_moe, first layers dense, tied", "mixtral", "qwen2_moe", "llama"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for more, and threads on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _native(folder: Path, config: Any, dtype: Any = "fp32") -> Transformer:
    """A native folder with random weights and a tokenizer; returns the model that is in it."""
    whole = Transformer(config).eval()
    initialize(whole, 4)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(4.0)  # wide enough that every weight counts
        for bias_E in whole.selection_biases():
            bias_E += torch.linspace(-0.301, 0.2, len(bias_E))
    folder.mkdir()
    tokens = {"bos_token_id": None, "eos_token_id": 96, "pad_token_id": 96}
    tokenizer = write_tokenizer(folder.with_name("tokenizer"))
    native_write.write(
        folder, Held(whole), origin="random", tokenizer=tokenizer, settings=tokens, dtype=dtype
    )
    return whole


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library") / "native"
    _native(folder, SIGMOID)
    return folder


@pytest.fixture
def ours(native: Path) -> Any:
    import transformers

    import moe.hf.auto  # noqa: F401

    return transformers.AutoModelForCausalLM.from_pretrained(native, dtype=torch.float32).eval()


def _ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", FAMILIES)
def test_a_model_comes_from_a_run_its_export_and_back(case: str, tmp_path: Path) -> None:
    source = saved(CASES[case][1])
    run, out = write_run(tmp_path / "run", source), tmp_path / "out"
    export(run, out, max_shard_size=20_000)
    ids_BS = _ids(2, 20)
    models = [from_pretrained(folder) for folder in (run, out)]
    with torch.no_grad():
        logits = [found(ids_BS) for found in models]
    assert torch.equal(*logits)
    written = save_pretrained(models[0], tmp_path / "again", tokenizer=out, max_shard_size=20_000)
    assert written.family.model_type == CASES[case][0]
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as theirs, safe_open(tmp_path / "again" / file.name, "pt") as again:
            assert all(torch.equal(theirs.get_tensor(key), again.get_tensor(key)) for key in theirs.keys())  # noqa: SIM118


def test_bf16_halves_the_weights_and_keeps_selection_biases(native: Path) -> None:
    wide, narrow = from_pretrained(native), from_pretrained(native, dtype="bf16")
    for (name, a), (_, b) in zip(wide.named_parameters(), narrow.named_parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b), name
        assert b.dtype == torch.bfloat16
    for a, b in zip(wide.selection_biases(), narrow.selection_biases(), strict=True):
        assert torch.equal(a, b)
        assert b.dtype == torch.float32
    assert narrow.embed.weight is narrow.head.weight


def test_what_cannot_be_saved_or_loaded_is_refused(native: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no stock architecture"):
        save_pretrained(from_pretrained(native), tmp_path / "out", tokenizer=native)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="holds no model"):
        from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="dtype is 'fp16'"):
        from_pretrained(native, dtype="fp16")  # type: ignore[arg-type]  # what a user might write


def test_a_tokenizer_of_transformers_is_saved_along(tmp_path: Path) -> None:
    import transformers

    run = write_run(tmp_path / "run", saved(CASES["llama"][1]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "tokenizer")
    save_pretrained(from_pretrained(run), tmp_path / "out", tokenizer=tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("!ab") == tokenizer("!ab")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_classes_load_a_native_folder_whole(dtype: torch.dtype, native: Path) -> None:
    import transformers

    import moe.hf.auto  # noqa: F401

    found, loading = transformers.AutoModelForCausalLM.from_pretrained(
        native, dtype=dtype, output_loading_info=True
    )
    assert not any(loading.values())
    expected = from_pretrained(native, dtype="fp32" if dtype == torch.float32 else "bf16")
    with torch.no_grad():
        assert torch.equal(found(_ids(2, 20)).logits, expected(_ids(2, 20)))
    config = transformers.AutoConfig.from_pretrained(native)
    assert (config.vocab_size, config.hidden_size, config.max_position_embeddings) == (112, 24, 96)
    assert config.section == SIGMOID


@pytest.mark.parametrize("config", [SIGMOID, *(CASES[case][1] for case in FAMILIES)])
def test_saving_and_loading_again_changes_no_bit(config: Any, tmp_path: Path) -> None:
    import transformers

    import moe.hf.auto  # noqa: F401

    whole = _native(tmp_path / "native", config)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    found.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again, expected = NativeFolder.open(tmp_path / "again"), Held(whole)
    assert again.model == config
    for name in expected.names():
        pairs = zip(again.pieces(name), expected.pieces(name), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), name


def test_a_fresh_model_is_drawn_and_a_partial_checkpoint_is_refused(native: Path, tmp_path: Path) -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    import moe.hf.auto  # noqa: F401

    config = transformers.AutoConfig.from_pretrained(native)
    fresh = transformers.AutoModelForCausalLM.from_config(config)
    drawn = Transformer(SIGMOID)
    initialize(drawn, 0)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(_ids(1, 9)).logits, drawn.eval()(_ids(1, 9)))
    tensors = load_file(native / "model.safetensors")
    del tensors["layers.1.ffn_norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((native / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.ffn_norm\.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks layers\.1\.ffn_norm\.weight"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("side", ["left", "right", "both", "inside"])
def test_padding_changes_no_logit_of_the_text(side: str, ours: Any) -> None:
    ids_BS, mask_BS = _ids(2, 14), torch.ones(2, 14, dtype=torch.int64)
    left, right = {"left": (4, 0), "right": (0, 4), "both": (2, 2), "inside": (0, 0)}[side]
    mask_BS[0, :left] = 0
    mask_BS[0, 14 - right :] = 0
    if side == "inside":
        mask_BS[0, 5:8] = 0
    kept = mask_BS[0].bool()
    ours = ours.double()
    with torch.no_grad():
        padded = ours(ids_BS, attention_mask=mask_BS).logits
        assert torch.allclose(padded[0, kept], ours(ids_BS[:1, kept]).logits[0], rtol=0, atol=1e-10)
        assert torch.allclose(padded[1], ours(ids_BS[1:]).logits[0], rtol=0, atol=1e-10)


def test_a_left_padded_batch_generates_what_each_text_does_alone(ours: Any) -> None:
    one, two = _ids(1, 5, 7), _ids(1, 9, 8)
    arguments: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 96,
        "eos_token_id": None,
    }
    alone = [
        ours.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, ids.shape[1] :]
        for ids in (one, two)
    ]
    ids_BS = torch.cat([F.pad(one, (4, 0), value=96), two])
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :4] = 0
    both = ours.generate(ids_BS, attention_mask=mask_BS, **arguments)[:, 9:]
    assert torch.equal(both[0], alone[0])
    assert torch.equal(both[1], alone[1])
    cached = ours.generate(ids_BS, attention_mask=mask_BS, use_cache=True, **arguments)[:, 9:]
    assert torch.equal(cached, both)


def test_the_loss_is_the_mean_over_labels_that_count(ours: Any) -> None:
    ids_BS = _ids(3, 12)
    labels_BS = ids_BS.clone()
    labels_BS[0, :5] = -100
    labels_BS[2] = -100
    found = ours(ids_BS, labels=labels_BS)
    logits = found.logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels_BS[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(found.loss, expected)
    count = int((labels_BS[:, 1:] != -100).sum())
    assert torch.allclose(ours(ids_BS, labels=labels_BS, num_items_in_batch=2 * count).loss, expected / 2)
    assert ours(ids_BS, labels=torch.full_like(ids_BS, -100)).loss.item() == 0.0


def test_recomputation_gives_the_same_gradients(ours: Any) -> None:
    ids_BS, found = _ids(2, 12), []
    ours.train()
    for recompute in (False, True):
        if recompute:
            ours.gradient_checkpointing_enable()
        ours.zero_grad()
        ours(ids_BS, labels=ids_BS).loss.backward()
        assert (ours.model.recompute == "block") == recompute
        found.append([parameter.grad.clone() for parameter in ours.parameters()])
    assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-7) for pair in zip(*found, strict=True))


def test_arguments_that_would_be_without_effect_are_refused(ours: Any) -> None:
    ids_BS = _ids(1, 6)
    for name, value in (
        ("position_ids", torch.arange(6)[None]),
        ("inputs_embeds", torch.zeros(1, 6, 24)),
        ("output_attentions", True),
    ):
        with pytest.raises(ConfigError, match=f"{name} is given"):
            ours(ids_BS, **{name: value})
    with pytest.raises(ConfigError, match="Masks of pairs"):
        ours(ids_BS, attention_mask=torch.ones(1, 1, 6, 6))
    with pytest.raises(ConfigError, match="has 112 rows"):
        ours.resize_token_embeddings(200)
    assert ours(ids_BS, use_cache=False, output_attentions=False).logits.shape == (1, 6, 112)


def test_the_trainer_trains_saves_and_resumes(native: Path, tmp_path: Path) -> None:
    import transformers

    import moe.hf.auto  # noqa: F401

    rows = [{"input_ids": row, "labels": row} for row in _ids(16, 12)]

    def trainer(steps: int) -> Any:
        found = transformers.AutoModelForCausalLM.from_pretrained(native, dtype=torch.float32)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            save_steps=2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
        )
        return transformers.Trainer(found, arguments, train_dataset=rows, eval_dataset=rows)

    whole = trainer(4)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before - 0.05
    assert NativeFolder.open(tmp_path / "checkpoint-4").model == SIGMOID
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, a), (_, b) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name


def test_a_state_in_several_files_is_loaded_file_by_file(native: Path, ours: Any) -> None:
    from safetensors.torch import load_file

    tensors = load_file(native / "model.safetensors")
    other = ours.__class__(ours.config)
    halves = [dict(list(tensors.items())[half::2]) for half in (0, 1)]
    assert other.load_state_dict(halves[0], strict=False).missing_keys == sorted(halves[1])
    other.load_state_dict(halves[1], strict=False)
    with torch.no_grad():
        assert torch.equal(other.eval()(_ids(1, 9)).logits, ours(_ids(1, 9)).logits)
    with pytest.raises(CheckpointError, match="the state lacks"):
        other.load_state_dict(halves[0])
    other.load_state_dict(ours.state_dict())


def test_generate_continues_a_native_folder_and_a_run_without_a_stock_architecture(
    native: Path, tmp_path: Path
) -> None:
    run = _run_of(tmp_path / "run", native)
    texts = []
    for source in (native, run):
        done = CliRunner().invoke(
            generate_command, [str(source), "--prompt", "!ab", "--greedy", "--max-new-tokens", "6"]
        )
        assert done.exit_code == 0, done.output
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert texts[0].startswith("!ab")
    with pytest.raises(ConfigError, match="it has no steps"):
        open_model(native, step=3)


def _run_of(folder: Path, native: Path) -> Path:
    """A run whose one checkpoint holds the weights of a native folder."""
    from moe.config import RunConfig
    from tests.stock import Saved, run_of

    opened = NativeFolder.open(native)
    stacked = {name for name in opened.names() if ".experts." in name}
    weights = {
        name: torch.stack(list(opened.pieces(name))) if name in stacked else next(opened.pieces(name))
        for name in opened.names()
    }
    page = run_of(CASES["qwen3_moe"][1]).model_dump()
    page["model"], page["balance"]["bias_update_rate"] = SIGMOID.model_dump(), 0.001
    return write_run(folder, Saved(RunConfig.model_validate(page), weights))


def test_light_imports_stay_light() -> None:
    program = "import moe.hf, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert {"torch", "deepspeed", "transformers"} & set(done.stdout.split()) == set()


def test_without_lm_eval_the_way_out_is_named(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = CliRunner().invoke(evaluate_command, [str(native), "--tasks", "anything"])
    assert done.exit_code == 2
    assert "pip install 'turnout[evaluate]'" in done.stderr
    done = CliRunner().invoke(evaluate_command, [str(native), "--limit", "3"])
    assert (done.exit_code, "it belongs to --tasks" in done.stderr) == (2, True)


@pytest.fixture
def with_lm_eval(tmp_path: Path) -> Path:
    """A python that has what this one has, and lm-eval."""
    home = tmp_path / "evaluate"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "here.pth").write_text("".join(f"{path}\n" for path in sys.path if Path(path).is_dir()))
    python = home / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "lm-eval>=0.4.9,<0.5"], check=True)
    return python


@pytest.mark.slow
def test_lm_eval_measures_a_task_of_ones_own(with_lm_eval: Path, native: Path, tmp_path: Path) -> None:
    def evaluate(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [with_lm_eval, "-m", "moe.evaluate", native, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    rows = [{"question": f"{letter} is", "answer": index % 2} for index, letter in enumerate("abcdefgh")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["a", "bc"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "letters.yaml").write_text(json.dumps(task))
    page = tmp_path / "scores.json"
    done = evaluate("--tasks", "letters", "--include-path", str(tmp_path), "--json", str(page))
    assert done.returncode == 0, done.stderr
    (score,) = json.loads(page.read_text())["scores"]
    assert (score["task"], score["metric"]) == ("letters", "acc")
    # By hand: the likelier of two continuations, from our own forward pass.
    whole, tokenizer = from_pretrained(native), open_model(native)[1]
    right = 0
    for row in rows:
        sums = []
        for choice in ("a", "bc"):
            given, ids = (
                tokenizer(text)["input_ids"] for text in (row["question"], f"{row['question']} {choice}")
            )
            with torch.no_grad():
                logp = whole(torch.tensor([ids]))[0].log_softmax(-1)
            sums.append(float(sum(logp[at - 1, ids[at]] for at in range(len(given), len(ids)))))
        right += int((sums[1] > sums[0]) == row["answer"])
    assert score["value"] == right / len(rows)
    done = evaluate("--tasks", "none-such")
    assert (done.returncode, "which lm-eval does not know" in done.stderr) == (2, True)
