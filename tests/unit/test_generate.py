import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

os.environ["HF_HUB_OFFLINE"] = "1"

from moe.errors import CheckpointError, ConfigError
from moe.export import command as export_command
from moe.generate import choose_sampling, command, open_model
from moe.hf.load import from_run
from moe.hf.sample import Sampling, _check_room, generate
from moe.hf.verify import our_logits
from moe.hf.write import new_folder, write
from tests.stock import CASES, saved, write_run

CONFIG = CASES["qwen3_moe, first layers dense, tied"][1]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for more, and threads on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with random weights at step 12."""
    return write_run(tmp_path_factory.mktemp("run") / "tiny", saved(CONFIG))


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = saved(CONFIG), tmp_path_factory.mktemp("export") / "out"
    with new_folder(target) as new:
        write(new, source.run, source.step, source.names(), source.pieces, run / "tokenizer")
    return target


@pytest.fixture(scope="module")
def opened(run: Path) -> tuple[Any, Any]:
    source = saved(CONFIG)
    return from_run(source.run, source.names(), source.pieces, run / "tokenizer")


def test_greedy_text_follows_the_largest_of_our_logits(
    opened: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = opened
    source, ids = saved(CONFIG), tokenizer("!abc")["input_ids"]
    for _ in range(12):
        logits_1SV = our_logits(CONFIG, source.pieces, torch.tensor([ids]))
        ids.append(int(logits_1SV[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    text = generate(model, tokenizer, "!abc", 12, Sampling(greedy=True))
    assert text == tokenizer.decode(ids[4:], skip_special_tokens=True)
    assert capsys.readouterr().out == f"!abc{text}\n"


def test_the_same_seed_draws_the_same_text_and_leaves_the_global_generator_alone(
    opened: tuple[Any, Any],
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    texts = [generate(*opened, "!abc", 24, Sampling(seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.get_rng_state())


def test_an_empty_prompt_starts_a_document(opened: tuple[Any, Any]) -> None:
    assert isinstance(generate(*opened, "", 4, Sampling(greedy=True)), str)


def test_more_tokens_than_positions_are_refused(opened: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="Use --max-new-tokens 92 or less"):
        generate(*opened, "!abc", 93, Sampling())


def test_a_prompt_that_fills_the_positions_is_refused_with_the_length_that_fits(
    opened: tuple[Any, Any],
) -> None:
    for wanted in (None, 1, 64):
        for length in (96, 200):
            with pytest.raises(
                ConfigError, match=f"has {length} tokens.* Cut the prompt to at most 95 tokens"
            ):
                generate(*opened, "a" * length, wanted, Sampling())
    assert isinstance(generate(*opened, "a" * 95, 1, Sampling(greedy=True)), str)


def test_without_a_number_of_new_tokens_there_are_64_or_what_fits() -> None:
    assert [_check_room(given, None, 96) for given in (1, 32, 33, 95)] == [64, 64, 63, 1]
    assert _check_room(1, None, 64) == 63
    with pytest.raises(ConfigError, match="the model has 1 position"):
        _check_room(1, None, 1)


def test_a_prompt_that_is_no_text_is_refused(run: Path) -> None:
    done = CliRunner().invoke(command, [str(run), "--prompt", "a\udcff\udcfe"])
    assert done.exit_code == 2
    assert done.stderr == "error: --prompt is 'a\\udcff\\udcfe': it must be text in UTF-8. Convert it.\n"


@pytest.mark.parametrize("temperature", ["0.001", "1000"])
def test_the_outermost_temperatures_and_the_last_seed_draw_text(run: Path, temperature: str) -> None:
    arguments = ["--prompt", "!abc", "--temperature", temperature, "--seed", str(2**63 - 1)]
    done = CliRunner().invoke(command, [str(run), *arguments, "--max-new-tokens", "8"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(command, [str(run), *arguments, "--seed", str(2**70)])
    assert (done.exit_code, "Traceback" in done.output) == (2, False)


def test_options_that_contradict_each_other_are_refused() -> None:
    none: dict[str, Any] = {"temperature": None, "top_p": None, "seed": None}
    assert choose_sampling(greedy=False, **none) == Sampling()
    assert choose_sampling(greedy=True, **none) == Sampling(greedy=True)
    for option, value in (("temperature", 0.5), ("top_p", 0.5), ("seed", 0)):
        with pytest.raises(ConfigError, match=r"--greedy draws nothing"):
            choose_sampling(greedy=True, **{**none, option: value})
    for temperature in (0.0, -1.0, 1e-320, 1e-4, 1001.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"must lie between 0\.001 and 1000"):
            choose_sampling(greedy=False, **{**none, "temperature": temperature})
    for option, value in (("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan"))):
        with pytest.raises(ConfigError, match="above 0"):
            choose_sampling(greedy=False, **{**none, option: value})


def test_what_is_neither_a_run_nor_an_export_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run folder"):
        open_model(tmp_path)
    with pytest.raises(CheckpointError, match="neither a run folder"):
        open_model(tmp_path / "none")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        open_model(tmp_path)
    for file in folder.iterdir():
        if not file.name.startswith("token"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        open_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        open_model(tmp_path)


def test_the_command_gives_the_same_text_from_a_run_and_from_its_export(run: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "result.json"
    arguments = [str(run), "--to", str(out), "--step", "12", "--max-shard-size", "20KB"]
    done = CliRunner().invoke(export_command, [*arguments, "--verify", "--json", str(page)])
    assert done.exit_code == 0, done.output
    assert "exported step 12" in done.output
    assert "max |difference|" in done.output
    result = json.loads(page.read_text())
    assert result["architecture"] == "Qwen3MoeForCausalLM"
    compared = result["comparison"]
    assert compared["max_difference"] < 1e-5 * compared["logit_scale"]
    assert abs(compared["kl"]) < 1e-8
    assert compared["num_positions"] == 2 * 96
    texts = [
        CliRunner().invoke(command, [str(source), "--prompt", "!abc", "--seed", "3"]).stdout
        for source in (run, out)
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith("!abc")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--step", "13"], "has no checkpoint of step 13"),
        (["--dtype", "fp16"], "'fp16' is not one of 'fp32', 'bf16'"),
        (["--max-shard-size", "big"], "for example 5GB"),
        (["--to", "{taken}"], "never overwrites"),
        (["--json", "{taken}/none/result.json"], "cannot be written"),
    ],
)
def test_the_export_command_says_what_is_wrong_in_one_message(
    changes: list[str], message: str, run: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    changes = [change.format(taken=taken) for change in changes]
    done = CliRunner().invoke(export_command, [str(run), "--to", str(tmp_path / "out"), *changes])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_run_that_is_missing_or_damaged_is_refused(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    with (damaged / "checkpoints/step_12/state.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"?")
    for source, message in ((tmp_path / "none", "holds no checkpoint"), (damaged, "was changed")):
        done = CliRunner().invoke(export_command, [str(source), "--to", str(tmp_path / "out")])
        assert done.exit_code == 2
        assert message in done.output
        assert not (tmp_path / "out").exists()


def test_a_run_without_a_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "tokenizer").rename(run / "hidden")
    try:
        done = CliRunner().invoke(export_command, [str(run), "--to", str(tmp_path / "out")])
    finally:
        (run / "hidden").rename(run / "tokenizer")
    assert done.exit_code == 2
    assert "a model is exported with its tokenizer" in done.output
    assert not (tmp_path / "out").exists()
