"""Models that stock code made, of every row of the table: in, the same function, and out again, bit for bit."""

import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"

from moe.hf.convert import disk_tensors, moves
from moe.hf.families import FAMILIES
from moe.hf.folder import HFFolder
from moe.hf.verify import Comparison, save_reference
from moe.hf.write import new_folder, write_model
from moe.model import Transformer
from tests.elsewhere import read_all
from tests.stock import write_tokenizer
from tests.stock_configs import CASES, StockCase, stock_folder

LOGITS, GRADIENTS = 1e-5, 1e-4
"""Largest difference relative to the largest value of the tensor."""


@dataclass
class Pair:
    """A stock model, the folder it was saved in, and ours of that folder."""

    stock: Any
    folder: HFFolder
    ours: Transformer


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for more, and threads on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, marks=pytest.mark.slow if case.slow else (), id=name)
        for name, case in CASES.items()
    ],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case: StockCase = request.param
    path = tmp_path_factory.mktemp("stock") / "model"
    stock = stock_folder(case, path)
    folder = HFFolder.open(path)
    return Pair(stock, folder, ours_of(folder))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("run") / "tokenizer")


def ours_of(folder: HFFolder) -> Transformer:
    """Our model with the folder's weights, in evaluation mode; every tensor of it comes from there."""
    model = Transformer(folder.model).eval()
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    assert sorted(tensors) == sorted(folder.names())
    for name, tensor in tensors.items():
        pieces = list(folder.pieces(name))
        with torch.no_grad():
            tensor.copy_(torch.stack(pieces) if ".experts." in name else pieces[0])
    return model


def ids(length: int = 40) -> Tensor:
    return torch.randint(112, (2, length), generator=torch.Generator().manual_seed(1))


def far(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest of theirs."""
    difference, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    return difference / scale if scale else difference


def on_disk(folder: HFFolder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names -> by those of the files, as an export would write them."""

    def read(name: str) -> Iterator[Tensor]:
        return iter(tensors[name] if ".experts." in name else [tensors[name]])

    plan = [move for move in moves(folder.family, folder.model) if move.ours in tensors]
    return dict(disk_tensors(plan, read))


def saved(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's files."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def export(folder: HFFolder, to: Path, tokenizer: Path, **choices: Any) -> Path:
    with new_folder(to) as new:
        write_model(new, folder.model, folder.names(), folder.pieces, tokenizer, "card", **choices)
    return to


def loaded(path: Path) -> Any:
    """The folder in stock code, every key accounted for."""
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert not any(loading.values()), loading
    for parameter in model.parameters():
        # Into memory of its own: mapped from a file it starts anywhere, and by that products choose their order.
        parameter.data = parameter.data.clone()
    return model.eval()


def test_every_row_of_the_table_has_several_cases_and_a_square_one() -> None:
    for family in FAMILIES:
        names = [name for name, case in CASES.items() if case.model_type == family.model_type]
        assert len(names) >= 3, family.model_type
        assert any("square" in name for name in names), family.model_type
    assert {case.model_type for case in CASES.values()} == {family.model_type for family in FAMILIES}


def test_imported_weights_give_the_logits_of_stock_code(pair: Pair) -> None:
    with torch.inference_mode():
        assert far(pair.ours(ids()), pair.stock(input_ids=ids()).logits) < LOGITS


def test_the_training_loss_has_the_gradients_of_stock_code_for_every_parameter(pair: Pair) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    tokens = ids(41)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    pair.stock.zero_grad()
    logits = pair.stock(input_ids=inputs).logits
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    theirs = {
        name: parameter.grad for name, parameter in pair.stock.named_parameters() if parameter.requires_grad
    }
    pair.ours.zero_grad()
    pair.ours.train()(inputs, labels).cross_entropy.backward()
    pair.ours.eval()
    ours = {name: parameter.grad for name, parameter in pair.ours.named_parameters()}
    assert all(gradient is not None for gradient in (*theirs.values(), *ours.values()))
    theirs, ours = revert_weight_conversion(pair.stock, theirs), on_disk(pair.folder, ours)
    assert sorted(theirs) == sorted(ours)
    wrong = {name: error for name in ours if (error := far(ours[name], theirs[name])) > GRADIENTS}
    assert not wrong


def test_what_is_exported_is_what_was_imported_bit_for_bit(
    pair: Pair, tmp_path: Path, tokenizer: Path
) -> None:
    path = export(pair.folder, tmp_path / "export", tokenizer)
    before, after = saved(pair.folder.path), saved(path)
    assert sorted(after) == sorted(before)
    different = [
        key
        for key in before
        if before[key].dtype != after[key].dtype or not torch.equal(before[key], after[key])
    ]
    assert not different
    again = HFFolder.open(path)
    assert (again.family, again.model) == (pair.folder.family, pair.folder.model)
    with torch.inference_mode():
        assert torch.equal(loaded(path)(input_ids=ids()).logits, pair.stock(input_ids=ids()).logits)


def test_a_fresh_process_finds_an_export_of_every_architecture_equal(tmp_path: Path, tokenizer: Path) -> None:
    last = {case.model_type: name for name, case in CASES.items() if not case.slow}
    folders = {name: tmp_path / f"case{number}" for number, name in enumerate(last.values())}
    for name, path in folders.items():
        stock_folder(CASES[name], path.with_suffix(".source"))
        folder = HFFolder.open(path.with_suffix(".source"))
        export(folder, path, tokenizer)
        save_reference(path.with_suffix(".safetensors"), folder.model, folder.pieces, "fp32")
    found = {name: result["comparison"] for name, result in read_all(Path(sys.executable), folders).items()}
    assert not {name: result for name, result in found.items() if not Comparison(**result).equal}


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss, yarn", "granitemoeshared", "afmoe"])
def test_bfloat16_and_several_files_stay_as_they_are(name: str, tmp_path: Path, tokenizer: Path) -> None:
    stock = stock_folder(CASES[name], tmp_path / "first")
    # Stock code keeps selection biases float32 where it loads, and so saves them.
    kept = {key: buffer.clone() for key, buffer in stock.named_buffers() if key.endswith("bias")}
    kept |= {
        key: value.data.clone() for key, value in stock.named_parameters() if key.endswith("expert_bias")
    }
    stock.to(torch.bfloat16)
    for key, tensor in dict(chain(stock.named_buffers(), stock.named_parameters())).items():
        if key in kept:
            tensor.data = kept[key]
    stock.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    folder = HFFolder.open(tmp_path / "model")
    path = export(folder, tmp_path / "export", tokenizer, dtype="bf16", max_shard_size=20_000)
    before, after = saved(folder.path), saved(path)
    assert len(list(folder.path.glob("*.safetensors"))) > 2
    assert len(list(path.glob("*.safetensors"))) > 2
    assert sorted(before) == sorted(after)
    assert {key: tensor.dtype for key, tensor in before.items()} == {
        key: tensor.dtype for key, tensor in after.items()
    }
    assert not [key for key in before if not torch.equal(before[key], after[key])]
