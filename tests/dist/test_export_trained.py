"""What expert-parallel ranks have trained, under every ZeRO stage, is what stock transformers loads."""

import os
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

os.environ["HF_HUB_OFFLINE"] = "1"

from moe.checkpoint.save import TrainState, save
from moe.config import ParallelConfig, RunConfig
from moe.export import export
from moe.hf import compare
from moe.hf.verify import Comparison
from tests.dist.layouts import LENGTH, VOCAB, ranks_of, start, tiny, train
from tests.harness import run_ranks
from tests.stock import write_tokenizer

STAGES: tuple[int, ...] = get_args(ParallelConfig.model_fields["zero_stage"].annotation)
STEPS = 4


def _run(folder: Path, stage: int) -> RunConfig:
    return tiny(
        run_dir=str(folder / f"zero-{stage}"),
        parallel={"expert_parallel_size": 2, "zero_stage": stage},
        train={"micro_batch_size": 2},
    )


def _train_and_save(rank: int, folder: Path) -> None:
    """Under each stage: train, save, and keep the logits that the ranks give together."""
    ids_BS = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    for stage in STAGES:
        engine = start(_run(folder, stage), ranks_of(rank, 2, 2))
        train(engine, 0, STEPS)
        save(engine, TrainState(STEPS, 0), "data")
        engine.wrapped.eval()
        with torch.no_grad():
            logits_BSV = engine.model(ids_BS)
        engine.wrapped.destroy()
        if rank == 0:
            kept = {"input_ids_BS": ids_BS, "logits_BSV": logits_BSV.contiguous()}
            save_file(kept, folder / f"zero-{stage}.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(_train_and_save, 2, folder, folder)
    for stage in STAGES:
        write_tokenizer(folder / f"zero-{stage}/tokenizer")
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_stock_transformers_gives_the_logits_of_the_ranks_that_trained(stage: int, trained: Path) -> None:
    out = trained / f"out-{stage}"
    exported = export(trained / f"zero-{stage}", out, max_shard_size=50_000, verify=stage == STAGES[-1])
    assert exported.architecture == "Qwen3MoeForCausalLM"
    assert (exported.comparison is None) == (stage != STAGES[-1])  # the same, in a process of its own
    found = [Comparison(**compare.measure(out, trained / f"zero-{stage}.safetensors"))]
    for compared in (*found, *filter(None, [exported.comparison])):
        assert compared.equal
        assert compared.max_difference < 1e-5
        assert compared.logit_scale > 0.5
        assert abs(compared.kl) < 1e-9
