"""A run begins with a checkpoint of someone else's: in any layout, each rank its own experts, as one process would."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"

from moe.checkpoint.save import TrainState, save
from moe.config import ModelConfig, RunConfig
from moe.dist import Ranks
from moe.engine.build import build
from moe.engine.engine import Engine
from moe.export import export
from moe.hf import compare, native_write
from moe.hf.beginning import begin
from moe.hf.native import NativeFolder
from moe.hf.source import open_weights
from moe.hf.verify import Comparison
from moe.ingest import ingest
from moe.model import Transformer, initialize
from moe.model.source import Weights
from tests.dist.layouts import LENGTH, VOCAB, curve, ranks_of, tiny, train
from tests.dist.parity import Curve, deviation
from tests.harness import run_ranks
from tests.stock import write_tokenizer

STEPS = 10
LAYOUTS = {"one process": (1, 1, 1), "EP 2, ZeRO 1": (2, 2, 1), "EP 2, ZeRO 3": (2, 2, 3)}
"""Ranks, expert-parallel size, ZeRO stage."""


def _stock_checkpoint(folder: Path) -> Path:
    """A Qwen3-MoE with random weights as stock `transformers` saves it, in several files."""
    import transformers

    torch.manual_seed(5)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder, max_shard_size="60KB")
    write_tokenizer(folder)
    return folder


def _run(source: Path, folder: Path, ep: int, zero: int) -> RunConfig:
    return tiny(
        run_dir=str(folder),
        init_from=str(source),
        model=open_weights(source).model.model_dump(),
        parallel={"expert_parallel_size": ep, "zero_stage": zero},
        train={"micro_batch_size": 2},
    )


class _Watched:
    """Weights that know which pieces were asked for."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.model = weights, weights.model
        self.asked: dict[str, set[range | None]] = {}

    def names(self) -> list[str]:
        return self.weights.names()

    def pieces(self, name: str, only: range | None = None) -> Iterator[Tensor]:
        self.asked.setdefault(name, set()).add(only)
        return self.weights.pieces(name, only)


def _train(rank: int, source: Path, folder: Path, layout: str) -> None:
    world, ep, zero = LAYOUTS[layout]
    ranks = ranks_of(rank, world, ep)
    run = _run(source, folder / "run", ep, zero)
    weights = begin(run)
    assert weights is not None
    watched = _Watched(weights)
    engine = Engine.start(run, build(run, ranks, watched), ranks)
    experts = {name: only for name, only in watched.asked.items() if ".experts." in name}
    held = 8 // ep
    assert len(experts) == 4
    assert all(
        only == {range(ranks.expert_rank * held, (ranks.expert_rank + 1) * held)} for only in experts.values()
    )
    assert watched.asked.keys() == set(weights.names())
    found = curve(train(engine, 0, STEPS))
    save(engine, TrainState(STEPS, 0), "data")
    ids_BS = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    engine.wrapped.eval()
    with torch.no_grad():
        logits_BSV = engine.model(ids_BS)
    engine.wrapped.destroy()
    if rank == 0:
        save_file(
            {"input_ids_BS": ids_BS, "logits_BSV": logits_BSV.contiguous()}, folder / "reference.safetensors"
        )
        torch.save(vars(found), folder / "curve.pt")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _stock_checkpoint(tmp_path_factory.mktemp("stock") / "hf")


@pytest.fixture(scope="module")
def native(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("native") / "folder"
    ingest(stock, target, max_shard_size=50_000)
    return target


@pytest.fixture(scope="module")
def trained(stock: Path, native: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for layout, (world, *_) in LAYOUTS.items():
        folder = found[layout] = tmp_path_factory.mktemp("trained")
        # One process reads what stock code wrote, ranks what was imported from it.
        run_ranks(_train, world, folder, stock if world == 1 else native, folder, layout)
        write_tokenizer(folder / "run/tokenizer")
    return found


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "one process"])
def test_training_on_is_that_of_one_process(layout: str, trained: dict[str, Path]) -> None:
    here, one = (Curve(**torch.load(trained[name] / "curve.pt")) for name in (layout, "one process"))
    far = deviation(here, one)
    assert len(here.total) == STEPS
    assert (far.loss < 1e-5, far.gradient_norm < 1e-4, far.counts_equal, far.health < 1e-5) == (True,) * 4
    assert one.cross_entropy[-1] < one.cross_entropy[0] - 0.2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_trained_on_loads_in_stock_transformers(layout: str, trained: dict[str, Path]) -> None:
    folder = trained[layout]
    exported = export(folder / "run", folder / "out")
    assert exported.architecture == "Qwen3MoeForCausalLM"
    compared = Comparison(**compare.measure(folder / "out", folder / "reference.safetensors"))
    assert compared.equal
    assert compared.logit_scale > 0.5


def test_the_first_forward_pass_is_that_of_the_stock_model(stock: Path, native: Path) -> None:
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        stock, dtype=torch.float32, local_files_only=True
    ).eval()
    ids_BS = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    for source in (stock, native):
        ours = build(_run(source, source, 1, 1), _alone(), open_weights(source)).eval()
        with torch.no_grad():
            assert torch.allclose(ours(ids_BS), theirs(input_ids=ids_BS).logits, rtol=0, atol=1e-5)


def _alone() -> Ranks:
    return Ranks(rank=0, world_size=1, local_rank=0)


SIGMOID: dict[str, Any] = {
    "num_experts": 8,
    "top_k": 2,
    "expert_intermediate_size": 24,
    "router_score": "sigmoid",
    "selection_bias": True,
}


class _Drawn:
    """A model with selection biases, drawn from a seed."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self.whole = Transformer(model)
        initialize(self.whole, 3)
        for layer, bias_E in enumerate(self.whole.selection_biases()):
            bias_E += torch.arange(8) * 0.1 + layer
        self.tensors = dict((*self.whole.named_parameters(), *self.whole.named_buffers()))

    def names(self) -> list[str]:
        return list(self.tensors)

    def pieces(self, name: str, only: range | None = None) -> Iterator[Tensor]:
        whole = self.tensors[name].detach()
        yield from whole if ".experts." in name else [whole]


def _is_the_whole(rank: int, source: Path, zero: int) -> None:
    expected = load_file(source / "reference.safetensors")
    run = _run(source, source, 2, zero)
    engine = Engine.start(run, build(run, ranks_of(rank, 2, 2), begin(run)), ranks_of(rank, 2, 2))
    for layer, bias_E in enumerate(engine.model.selection_biases()):
        assert torch.equal(bias_E.cpu(), torch.arange(8) * 0.1 + layer)
    engine.wrapped.eval()
    with torch.no_grad():
        logits_BSV = engine.model(expected["input_ids_BS"])
    assert torch.allclose(logits_BSV, expected["logits_BSV"], rtol=0, atol=1e-6)
    engine.wrapped.destroy()


@pytest.mark.parametrize("zero", [1, 3])
def test_selection_biases_and_tied_embeddings_come_along(zero: int, tmp_path: Path) -> None:
    model = {"moe": SIGMOID, "tie_embeddings": True}
    drawn = _Drawn(tiny(balance={"bias_update_rate": 0.1}, model=model).model)
    source = tmp_path / "native"
    source.mkdir()
    native_write.write(source, drawn, origin="drawn", tokenizer=None, settings={})
    assert NativeFolder.open(source).model == drawn.model
    ids_BS = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        saved = {"input_ids_BS": ids_BS, "logits_BSV": drawn.whole.eval()(ids_BS).contiguous()}
    save_file(saved, source / "reference.safetensors")
    run_ranks(_is_the_whole, 2, tmp_path, source, zero)
