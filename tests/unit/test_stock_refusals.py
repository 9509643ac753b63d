"""Hugging Face folders that are not what they say, or say what we have no switch for: one clean error each."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"

from moe.errors import CheckpointError
from moe.hf.folder import INDEX, SINGLE, HFFolder
from tests.stock_configs import CASES, stock_folder

Change = Callable[[dict[str, Any]], object]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Name of a case -> its folder's files, made when first asked for."""

    class Made(dict[str, dict[str, bytes]]):
        def __missing__(self, name: str) -> dict[str, bytes]:
            path = tmp_path_factory.mktemp("stock")
            stock_folder(CASES[name], path)
            self[name] = {file.name: file.read_bytes() for file in path.iterdir()}
            return self[name]

    return Made()


def lay(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def change_config(folder: Path, change: Change) -> None:
    page = json.loads((folder / "config.json").read_text())
    change(page)
    (folder / "config.json").write_text(json.dumps(page))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / SINGLE)
    change(weights)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})


def in_two_files(folder: Path) -> dict[str, str]:
    """Split the one file in two with an index; returns its weight map."""
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    keys = sorted(weights)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((keys[::2], keys[1::2]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        HFFolder.open(folder)
    return str(error.value)


SETTINGS: dict[str, tuple[str, Change, str]] = {
    "another activation": (
        "qwen3_moe",
        lambda page: page.update(hidden_act="gelu"),
        "hidden_act is 'gelu'",
    ),
    "biases that are built out": (
        "ernie4_5_moe",
        lambda page: page.update(use_bias=True),
        "use_bias is True",
    ),
    "another kind of scaling": (
        "qwen3_moe",
        lambda page: page.update(
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 48,
            }
        ),
        "rope_type is longrope",
    ),
    "scaling that grows with the text": (
        "mixtral",
        lambda page: page.update(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type is dynamic",
    ),
    "scaling in the older spelling": (
        "mixtral",
        lambda page: page.update(
            rope_parameters=None, rope_theta=1e4, rope_scaling={"type": "dynamic", "factor": 2.0}
        ),
        "rope_type is dynamic",
    ),
    "partly rotated heads": (
        "mixtral",
        lambda page: page["rope_parameters"].update(partial_rotary_factor=0.5),
        "partial_rotary_factor is 0.5",
    ),
    "pairs half a head apart": (
        "deepseek_v3",
        lambda page: page.update(rope_interleave=False),
        "rope_interleave is False",
    ),
    "another choice of groups": (
        "deepseek_v2",
        lambda page: page.update(topk_method="noaux_tc"),
        "topk_method is noaux_tc",
    ),
    "no shared expert where there is one always": (
        "hunyuan_v1_moe",
        lambda page: page.update(num_shared_expert=2),
        "num_shared_expert is 2",
    ),
    "a layer of another kind": (
        "gpt_oss",
        lambda page: page.update(layer_types=["chunked_attention", "full_attention", "full_attention"]),
        "layer_types has chunked_attention",
    ),
    "biases of feed-forward blocks": (
        "llama",
        lambda page: page.update(mlp_bias=True),
        "mlp_bias is True",
    ),
    "three choices of a mixer of two": (
        "phimoe",
        lambda page: page.update(num_experts_per_tok=3),
        "stock phimoe has model.moe.top_k=2",
    ),
    "tied embeddings whose head has a bias": (
        "phimoe",
        lambda page: page.update(tie_word_embeddings=True, lm_head_bias=True),
        "model.head_bias is true, but model.tie_embeddings is true",
    ),
}


@pytest.mark.parametrize(("name", "change", "said"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting_without_a_switch_is_refused(
    name: str, change: Change, said: str, folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    change_config(lay(folders[name], tmp_path), change)
    message = refused(tmp_path)
    assert said in message
    assert "config.json" in message
    assert message.endswith(".")


def test_an_unknown_architecture_is_told_which_there_are(
    folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    change_config(lay(folders["mixtral"], tmp_path), lambda page: page.update(model_type="jamba"))
    message = refused(tmp_path)
    assert "model_type 'jamba', which is not in the table" in message
    assert "afmoe, deepseek_v2" in message


def test_a_page_without_an_architecture_is_refused(
    folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    change_config(lay(folders["mixtral"], tmp_path), lambda page: page.pop("model_type"))
    assert "model_type None, which is not in the table" in refused(tmp_path)


def test_quantised_weights_are_refused(folders: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    change_config(
        lay(folders["gpt_oss"], tmp_path),
        lambda page: page.update(quantization_config={"quant_method": "mxfp4"}),
    )
    message = refused(tmp_path)
    assert "quantised weights (quantization_config)" in message
    assert "Convert them to bfloat16" in message


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", "\xff\xfe", '{"model_type": ["mixtral"]}'])
def test_garbage_for_a_config_is_refused(
    content: str, folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    (lay(folders["mixtral"], tmp_path) / "config.json").write_bytes(content.encode("latin-1"))
    message = refused(tmp_path)
    assert "config.json" in message


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"num_local_experts": -1},
        {"num_hidden_layers": 10**9},
        {"rope_parameters": 7},
        {"vocab_size": None},
        {"head_dim": 7},
        {"num_experts_per_tok": 9},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(
    change: dict[str, Any], folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    change_config(lay(folders["mixtral"], tmp_path), lambda page: page.update(change))
    assert "config.json" in refused(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path / "nowhere")
    assert "config.json cannot be read" in message
    assert "Give a folder that transformers has saved" in message


def test_an_unknown_key_is_refused(folders: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    change_weights(
        lay(folders["mixtral"], tmp_path), lambda w: w.update(extra=torch.ones(2), further=torch.ones(2))
    )
    message = refused(tmp_path)
    assert "holds extra and 1 more, which config.json does not call for" in message
    assert "Mend config.json, or remove them" in message


def test_biases_that_the_settings_do_not_speak_of_are_refused(
    folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Stock code drops them with no more than a warning."""
    change_config(
        lay(folders["qwen3_moe, not normalised"], tmp_path), lambda page: page.update(attention_bias=False)
    )
    assert "self_attn.k_proj.bias and 11 more" in refused(tmp_path)


def test_frequencies_that_old_releases_saved_are_passed_over(
    folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(lay(folders["mixtral"], tmp_path), lambda w: w.update({key: torch.ones(4)}))
    HFFolder.open(tmp_path)


@pytest.mark.parametrize(
    "key",
    [Q_PROJ, "model.norm.weight", "lm_head.weight", "model.layers.2.block_sparse_moe.experts.3.w2.weight"],
)
def test_a_missing_key_is_refused(key: str, folders: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    change_weights(lay(folders["mixtral"], tmp_path), lambda w: w.pop(key))
    assert f"{key} is missing, which config.json calls for. Fetch the folder again" in refused(tmp_path)


def test_a_missing_selection_bias_is_refused(folders: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    change_weights(lay(folders["deepseek_v3"], tmp_path), lambda w: w.pop(key))
    assert f"{key} is missing" in refused(tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_tensor_of_another_shape_is_refused(
    name: str, folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    def transpose(weights: dict[str, Tensor]) -> None:
        weights[Q_PROJ] = weights[Q_PROJ].t().contiguous()

    change_weights(lay(folders[name], tmp_path), transpose)
    message = refused(tmp_path)
    assert f"{Q_PROJ} has shape [24, " in message
    assert "fetch both again" in message


def test_an_expert_of_another_shape_is_refused(folders: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    key = "model.layers.0.block_sparse_moe.experts.4.w1.weight"
    change_weights(lay(folders["mixtral"], tmp_path), lambda w: w.update({key: w[key][:-1].clone()}))
    assert f"{key} has shape [19, 24], but config.json makes it [20, 24]" in refused(tmp_path)


def test_fused_experts_as_transformers_5_has_them_in_memory_are_refused(
    folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    def fuse(weights: dict[str, Tensor]) -> None:
        each = [weights.pop(f"model.layers.0.block_sparse_moe.experts.{n}.w2.weight") for n in range(5)]
        weights["model.layers.0.mlp.experts.down_proj"] = torch.stack(each)

    change_weights(lay(folders["mixtral"], tmp_path), fuse)
    assert "experts.0.w2.weight is missing" in refused(tmp_path)


def test_integers_and_bytes_are_no_weights(folders: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    change_weights(lay(folders["mixtral"], tmp_path), lambda w: w.update({Q_PROJ: w[Q_PROJ].to(torch.uint8)}))
    message = refused(tmp_path)
    assert f"{Q_PROJ} is of type U8" in message


def test_weights_in_two_files_are_read_by_their_index(
    folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    weights = load_file(lay(folders["mixtral"], tmp_path) / SINGLE)
    in_two_files(tmp_path)
    (piece,) = HFFolder.open(tmp_path).pieces("layers.1.attention.query.weight")
    assert torch.equal(piece, weights[Q_PROJ])


def test_a_tensor_in_two_files_is_refused(folders: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    weight_map = in_two_files(lay(folders["mixtral"], tmp_path))
    (other,) = set(weight_map.values()) - {weight_map[Q_PROJ]}
    weights = load_file(tmp_path / other)
    save_file({**weights, Q_PROJ: load_file(tmp_path / weight_map[Q_PROJ])[Q_PROJ]}, tmp_path / other)
    message = refused(tmp_path)
    assert f"{Q_PROJ} is in model-00001-of-00002.safetensors and in model-00002" in message
    assert "Remove one" in message


def test_a_file_of_the_index_that_is_not_there_is_refused(
    folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    weight_map = in_two_files(lay(folders["mixtral"], tmp_path))
    (tmp_path / weight_map[Q_PROJ]).unlink()
    message = refused(tmp_path)
    assert weight_map[Q_PROJ] in message
    assert "Fetch" in message


def test_an_index_that_puts_a_tensor_into_the_wrong_file_is_refused(
    folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """The files say where tensors are, but an index that says otherwise was made for other files."""
    weight_map = in_two_files(lay(folders["mixtral"], tmp_path))
    (other,) = set(weight_map.values()) - {weight_map[Q_PROJ]}
    write_index(tmp_path, {**weight_map, Q_PROJ: other})
    message = refused(tmp_path)
    assert Q_PROJ in message
    assert other in message


def test_an_index_that_names_a_tensor_that_no_file_has_is_refused(
    folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    weight_map = in_two_files(lay(folders["mixtral"], tmp_path))
    write_index(tmp_path, {**weight_map, "more.weight": weight_map[Q_PROJ]})
    assert "more.weight" in refused(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..", ""])
def test_an_index_that_leads_out_of_the_folder_is_refused(
    name: str, folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    weight_map = in_two_files(lay(folders["mixtral"], tmp_path))
    write_index(tmp_path, {**weight_map, Q_PROJ: name})
    message = refused(tmp_path)
    assert repr(name) in message
    assert "Fetch the folder again" in message


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {}}',
    ],
)
def test_garbage_for_an_index_is_refused(
    content: str, folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    in_two_files(lay(folders["mixtral"], tmp_path))
    (tmp_path / INDEX).write_text(content)
    message = refused(tmp_path)
    assert INDEX in message
    assert "Fetch the folder again" in message


@pytest.mark.parametrize("kept", [0, 4, 8, 200, -1000, -1])
def test_a_file_that_was_cut_is_refused(
    kept: int, folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    path = lay(folders["mixtral"], tmp_path) / SINGLE
    path.write_bytes(path.read_bytes()[:kept])
    message = refused(tmp_path)
    assert f"{SINGLE} is no whole safetensors file" in message
    assert "Fetch or write it again" in message


@pytest.mark.parametrize("header", [b"{", b"[]", b"3", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [1]}}'])
def test_a_file_with_a_damaged_header_is_refused(
    header: bytes, folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    path = lay(folders["mixtral"], tmp_path) / SINGLE
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert f"{SINGLE} is no whole safetensors file" in refused(tmp_path)


def test_a_folder_without_safetensors_is_refused(
    folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    path = lay(folders["mixtral"], tmp_path) / SINGLE
    path.rename(tmp_path / "pytorch_model.bin")
    message = refused(tmp_path)
    assert "weights are read from safetensors alone" in message
    assert "Save them as such" in message


def test_a_tied_models_head_is_passed_over_only_if_stock_code_would_do_so(
    folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """A copy of the embedding is no news; a head of its own, which tying would drop, is."""
    lay(folders["mixtral, square tied"], tmp_path)
    change_weights(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    HFFolder.open(tmp_path)
    change_weights(tmp_path, lambda w: w.update({"lm_head.weight": w["lm_head.weight"] + 1}))
    assert "lm_head.weight" in refused(tmp_path)


def test_modules_that_the_settings_do_not_speak_of_are_refused(
    folders: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    change_config(lay(folders["deepseek_v3"], tmp_path), lambda page: page.update(num_nextn_predict_layers=0))
    change_weights(tmp_path, lambda w: w.update({"model.layers.3.enorm.weight": torch.ones(24)}))
    assert "holds model.layers.3.enorm.weight, which config.json does not call for" in refused(tmp_path)
