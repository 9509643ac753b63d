"""Packed documents on any layout: the engine's steps are the same, ranks that share sequences included."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe.config import RunConfig
from moe.data.shards import TokenData
from moe.data.sources import open_sources
from moe.dist import Ranks, consecutive
from moe.model import SequenceGroup, Transformer
from tests.dist.layouts import LENGTH, VOCAB, ranks_of, start, tiny
from tests.harness import run_ranks
from tests.unit.corpus import raw_data
from tests.unit.test_documents import KINDS, make, packed
from tests.unit.test_documents import LENGTH as ROW

LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 2)]
"""(ranks, EP, SP)."""


def _in_parts(rank: int, size: int) -> None:
    ids, labels, mask, documents = packed()
    for kind in ("grouped", "latent", "windowed sinks"):
        if KINDS[kind].get("num_kv_heads", size) % size:
            continue
        whole = make(KINDS[kind])
        ours = Transformer(whole.config, sequence_group=SequenceGroup(size, consecutive(size))).double()
        ours.load_state_dict(whole.state_dict())
        here = Ranks(rank=rank, world_size=size, sequence_parallel_size=size).positions(ROW)
        expected = whole(ids, labels, mask, None, documents).cross_entropy
        found = ours(ids[:, here], labels[:, here], mask[:, here], None, documents).cross_entropy
        expected.backward()
        found.backward()
        total = found.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, expected.detach())
        for mine, its in zip(ours.parameters(), whole.parameters(), strict=True):
            assert mine.grad is not None
            dist.all_reduce(mine.grad)
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-8, atol=1e-10)


def test_ranks_that_share_sequences_keep_documents_apart(tmp_path: Path) -> None:
    run_ranks(_in_parts, 2, tmp_path, 2)


def _run(folder: Path, ep: int, sp: int) -> RunConfig:
    return tiny(
        parallel={"expert_parallel_size": ep, "sequence_parallel_size": sp},
        train={"micro_batch_size": 2},
        model={"attention": {"num_heads": 4, "num_kv_heads": 4}},
        data={
            "path": str(folder / "data"),
            "sequence_length": LENGTH,
            "packing": "best_fit",
            "attend_across_documents": False,
        },
    )


def _trained(rank: int, world_size: int, folder: Path) -> None:
    for layout in LAYOUTS:
        if layout[0] != world_size:
            continue
        run, ranks = _run(folder, *layout[1:]), ranks_of(rank, *layout)
        data = TokenData.open(folder / "data", verify=False)
        batch, steps = run.train.global_batch_size, run.train.steps
        sources = open_sources(run.data, data, global_batch_size=batch, steps=steps, seed=0)
        batches = sources.batches(
            run.data,
            global_batch_size=batch,
            micro_batch_size=2,
            rank=ranks.data_rank,
            world_size=ranks.data_world_size,
            positions=ranks.positions(LENGTH),
            seed=0,
            start_step=0,
        )
        engine = start(run, ranks)
        curve = []
        for step, here in enumerate(itertools.islice(batches, 4)):
            assert all(one.documents_BS is not None for one in here)
            result = engine.step(here, step)
            curve.append([float(result.total), float(result.cross_entropy), float(result.gradient_norm)])
        if rank == 0:
            np.save(folder / f"{'-'.join(map(str, layout))}.npy", np.array(curve))
        engine.wrapped.destroy()


def test_training_on_packed_documents_is_the_same_on_every_layout(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    documents: Any = [draw.integers(2, VOCAB, n).tolist() for n in draw.integers(2, LENGTH + 9, 200)]
    raw_data(tmp_path / "data", {"train": documents}, vocab_size=VOCAB)
    for ranks in (1, 2):
        run_ranks(_trained, ranks, tmp_path, ranks, tmp_path)
    one, *others = [np.load(tmp_path / f"{'-'.join(map(str, layout))}.npy") for layout in LAYOUTS]
    assert len(one) == 4
    for other in others:
        np.testing.assert_allclose(other, one, rtol=1e-5)
