"""Prediction modules: the keys of released weights, in and out, and the function of stock code's `MtpModel`."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"

from moe import log
from moe.errors import CheckpointError
from moe.hf.folder import HFFolder
from moe.model import Transformer
from moe.model.prediction import ahead
from tests.stock import write_tokenizer
from tests.stock_configs import CASES, StockCase, fill, stock_folder
from tests.unit.test_stock_families import GRADIENTS, LOGITS, export, far, ids, ours_of, saved

BLOCKS = "mtp_block."
NAMES = {"post_norm.weight": "shared_head.norm.weight"}
COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
MODELS = ["deepseek_v3", "glm4_moe", "glm4_moe, groups biased", "glm4_moe_lite", "deepseek_v3, yarn"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_modules(
    name: str, folder: Path, depth: int = 1, *, copies: bool = True, **changes: Any
) -> tuple[Any, Any]:
    """A stock model and its prediction modules, saved as released weights are: numbered on behind the layers."""
    from transformers.modeling_layers import MtpModel

    case = CASES[name]
    case = StockCase(case.model_type, {**case.settings, "num_nextn_predict_layers": depth, **changes})
    main = stock_folder(case, folder)
    # Where stock code does not know of them, it still has all that they are made of.
    main.config.num_mtp_layers, main.config.mtp_mlp_layer_types = depth, ["sparse"] * depth
    modules = MtpModel(main, depth).eval()
    fill(modules.layers, seed=1)
    weights = load_file(folder / "model.safetensors")
    for number, layer in enumerate(modules.layers):
        place = f"model.layers.{len(main.model.layers) + number}."
        for key, tensor in layer.state_dict().items():
            for end, part in _parts(key.removeprefix(BLOCKS), tensor):
                weights[place + NAMES.get(end, end)] = part.clone()
        if copies:
            weights |= {place + key: weights[first].clone() for key, first in COPIES.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return main, modules


def _parts(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Experts one by one, as on disk."""
    if not key.startswith("mlp.experts."):
        yield key, tensor
        return
    for number, expert in enumerate(tensor):
        place = f"mlp.experts.{number}."
        if key.endswith("down_proj"):
            yield f"{place}down_proj.weight", expert
        else:
            gate, up = expert.chunk(2)
            yield f"{place}gate_proj.weight", gate
            yield f"{place}up_proj.weight", up


def stock_states(main: Any, modules: Any, tokens: Tensor) -> list[Tensor]:
    """[B, S, D] of each module, on sequences whose next tokens are known, zeros behind their ends."""
    length = tokens.shape[1] - 1
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    positions = torch.arange(length)[None]
    h_BSD = main.model(input_ids=tokens[:, :-1]).last_hidden_state
    turn = main.model.rotary_emb(h_BSD, position_ids=positions)
    states = []
    for number, layer in enumerate(modules.layers):
        following = main.model.embed_tokens(ahead(tokens[:, 1:], number))
        h_BSD = layer(
            following, h_BSD, turn, attention_mask=mask, position_ids=positions, past_key_values=None
        )
        states.append(h_BSD)
    return states


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_modules_give_the_hidden_states_and_logits_of_stock_code(
    name: str, depth: int, tmp_path: Path
) -> None:
    main, modules = with_modules(name, tmp_path / "model", depth)
    folder = HFFolder.open(tmp_path / "model")
    assert folder.model.prediction_depth == depth
    ours = ours_of(folder)
    found: list[Tensor] = []
    for module in ours.predictions:
        module.register_forward_hook(lambda _module, _inputs, output: found.append(output[0]))
    tokens = ids(41)
    with torch.no_grad():
        expected = stock_states(main, modules, tokens)
        ours.train()(tokens[:, :-1], tokens[:, 1:].contiguous())
        assert far(ours.eval()(tokens), main(input_ids=tokens).logits) < LOGITS
        assert len(found) == depth
        for state, theirs in zip(found, expected, strict=True):
            assert far(state, theirs) < LOGITS
            assert far(ours.head(state), main.lm_head(theirs)) < LOGITS


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", MODELS[:4])
def test_modules_come_out_bit_for_bit(name: str, depth: int, tmp_path: Path) -> None:
    with_modules(name, tmp_path / "model", depth)
    folder = HFFolder.open(tmp_path / "model")
    path = export(folder, tmp_path / "export", write_tokenizer(tmp_path / "tokenizer"))
    before, after = saved(folder.path), saved(path)
    assert sorted(before) == sorted(after)
    assert not [key for key in before if not torch.equal(before[key], after[key])]
    assert HFFolder.open(path).model == folder.model


def test_weights_without_a_second_embedding_and_head_are_read_and_written_with_them(tmp_path: Path) -> None:
    with_modules("deepseek_v3", tmp_path / "model", copies=False)
    folder = HFFolder.open(tmp_path / "model")
    path = export(folder, tmp_path / "export", write_tokenizer(tmp_path / "tokenizer"))
    after = saved(path)
    for key, first in COPIES.items():
        assert torch.equal(after[f"model.layers.3.{key}"], after[first])
    assert sorted(folder.names()) == sorted(HFFolder.open(path).names())


def test_a_second_embedding_that_differs_is_refused(tmp_path: Path) -> None:
    with_modules("deepseek_v3", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.3.embed_tokens.weight"][0, 0] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"embed_tokens\.weight differs .* num_nextn_predict_layers to 0"
    ):
        HFFolder.open(tmp_path)


def test_stock_code_loads_what_is_exported_with_modules(tmp_path: Path) -> None:
    """It leaves them out of the model, as it does with released weights, and generates with them when asked to."""
    from transformers import AutoModelForCausalLM

    main, _ = with_modules("glm4_moe", tmp_path / "model")
    folder = HFFolder.open(tmp_path / "model")
    path = export(folder, tmp_path / "export", write_tokenizer(tmp_path / "tokenizer"))
    again, loading = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )
    assert not loading["missing_keys"]
    assert all(key.startswith("model.layers.3.") for key in loading["unexpected_keys"])
    with torch.inference_mode():
        assert far(again(input_ids=ids()).logits, main(input_ids=ids()).logits) < LOGITS


@pytest.mark.parametrize(("name", "layers"), [("deepseek_v3", 61), ("glm4_moe", 46)])
def test_stock_code_loads_the_modules_of_an_export(name: str, layers: int, tmp_path: Path) -> None:
    """It finds them by the number that they have in the released models, so the model has as many layers."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    deep = {"num_hidden_layers": layers, "first_k_dense_replace": layers - 1}
    main, modules = with_modules(name, tmp_path / "model", **deep)
    folder = HFFolder.open(tmp_path / "model")
    path = export(folder, tmp_path / "export", write_tokenizer(tmp_path / "tokenizer"))
    again = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    modules_again = MtpModel.from_pretrained(again).eval()
    with torch.no_grad():
        (expected,), (found,) = (
            stock_states(*pair, ids(17)) for pair in ((main, modules), (again, modules_again))
        )
    assert far(found, expected) < LOGITS


def test_the_gradient_of_the_further_loss_reaches_embedding_body_and_head(tmp_path: Path) -> None:
    main, modules = with_modules("deepseek_v3", tmp_path, 2)
    ours, tokens = ours_of(HFFolder.open(tmp_path)).train(), ids(41)
    labels = tokens[:, 1:].contiguous()
    ours(tokens[:, :-1], labels).further.backward()
    losses = []
    for number, states in enumerate(stock_states(main, modules, tokens)):
        logits = main.lm_head(states)
        known = logits.shape[1] - number - 1  # beyond the end nothing is known
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[:, :known].flatten(0, 1), labels[:, number + 1 :].flatten(), reduction="sum"
            )
        )
    (sum(losses) / 2).backward()
    pairs = {
        "embed.weight": main.model.embed_tokens.weight,
        "head.weight": main.lm_head.weight,
        "norm.weight": main.model.norm.weight,
        "layers.0.attention.output.weight": main.model.layers[0].self_attn.o_proj.weight,
        "layers.2.ffn.experts.down": main.model.layers[2].mlp.experts.down_proj,
        "layers.1.ffn.router.weight": main.model.layers[1].mlp.gate.weight,
        "predictions.0.project.weight": modules.layers[0].eh_proj.weight,
        "predictions.0.norm.weight": modules.layers[0].post_norm.weight,
        "predictions.1.embedding_norm.weight": modules.layers[1].enorm.weight,
        "predictions.1.hidden_norm.weight": modules.layers[1].hnorm.weight,
        "predictions.1.block.ffn.experts.gate_up": modules.layers[1].mtp_block.mlp.experts.gate_up_proj,
    }
    found = dict(ours.named_parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in found.values())
    errors = {name: far(found[name].grad, theirs.grad) for name, theirs in pairs.items()}
    assert max(errors.values()) < GRADIENTS, errors


def test_a_folder_that_promises_modules_and_has_none_is_read_without_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log.get(), "propagate", True)
    case = CASES["deepseek_v3"]
    stock_folder(StockCase(case.model_type, {**case.settings, "num_nextn_predict_layers": 1}), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    folder = HFFolder.open(tmp_path)
    assert folder.model.prediction_depth == 0
    assert not len(Transformer(folder.model).predictions)
    assert "num_nextn_predict_layers is 1" in caplog.text


def test_a_module_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with_modules("deepseek_v3", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.3.eh_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight is missing"):
        HFFolder.open(tmp_path)
