"""Ranks that share sequences do what one rank does with whole ones: attention, losses, evaluation, checkpoints."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe import train as training
from moe.checkpoint.resume import restore
from moe.checkpoint.save import TrainState, save
from moe.config import AttentionConfig, ModelConfig, RunConfig
from moe.data.loader import Batch
from moe.data.shards import TokenData
from moe.dist import Ranks, consecutive
from moe.model import ModelOutput, SequenceGroup, Transformer, initialize
from moe.model.attention import Attention, attention
from moe.model.rope import rotation
from tests.dist.layouts import LENGTH, VOCAB, batches, curve, ranks_of, start, tiny, train
from tests.harness import run_ranks
from tests.unit.corpus import raw_data

ATTENTIONS = {
    "grouped": AttentionConfig(num_heads=8, num_kv_heads=4, qkv_bias=True),
    "one key head a rank": AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=6, qk_norm=False),
}


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _attended(mixer: Attention, config: ModelConfig, x_BPD: Tensor, up_BPD: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of the weights."""
    x_BPD = x_BPD.clone().requires_grad_()
    turn = rotation(12, config.head_dim, config.attention.rope_theta, x_BPD.device)
    y_BPD = mixer(x_BPD, turn)
    y_BPD.backward(up_BPD)
    assert x_BPD.grad is not None
    return [y_BPD.detach(), x_BPD.grad, *(p.grad for p in mixer.parameters() if p.grad is not None)]


def _attention_in_parts(rank: int, size: int) -> None:
    group = SequenceGroup(size, consecutive(size))
    there, back = _drawn(2, 3, 4 * size, 5, seed=rank), _drawn(2, 3, size, 5, seed=rank + 9)
    spread, few = group.scatter_heads(there, back)
    assert spread.shape == (2, 3 * size, 4, 5)
    assert few.shape == (2, 3 * size, 1, 5)
    assert torch.equal(group.gather_heads(spread), there)
    assert torch.equal(group.gather_heads(few), back)

    x_BSD, up_BSD = _drawn(2, 12, 48, seed=1), _drawn(2, 12, 48, seed=2)
    here = Ranks(rank=rank, world_size=size, sequence_parallel_size=size).positions(12)
    for heads in ATTENTIONS.values():
        config = ModelConfig(vocab_size=8, hidden_size=48, num_layers=1, intermediate_size=8, attention=heads)
        whole = attention(config, 0).double()
        for index, parameter in enumerate(whole.parameters()):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
        ours = attention(config, 0, group).double()
        ours.load_state_dict(whole.state_dict())
        y, grad, *weights = _attended(whole, config, x_BSD, up_BSD)
        y_here, grad_here, *weights_here = _attended(ours, config, x_BSD[:, here], up_BSD[:, here])
        torch.testing.assert_close(y_here, y[:, here], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_here, grad[:, here], rtol=1e-10, atol=1e-10)
        assert len(weights_here) == len(weights) >= 4
        for gradient_here, gradient in zip(weights_here, weights, strict=True):
            dist.all_reduce(gradient_here)
            torch.testing.assert_close(gradient_here, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [2, 4])
def test_attention_over_ranks_is_attention(size: int, tmp_path: Path) -> None:
    """Forward and backward, in float64; what only a later rank holds is not seen by an earlier one."""
    run_ranks(_attention_in_parts, size, tmp_path, size)


BALANCES: dict[str, dict[str, float]] = {
    "sequence": {"sequence_loss_weight": 0.3},
    "micro-batch": {"sequence_loss_weight": 0.0, "micro_batch_loss_weight": 0.3},
    "both": {"sequence_loss_weight": 0.1, "micro_batch_loss_weight": 0.3},
}
LAYOUTS = [(1, 1, 1), (4, 2, 2), (4, 4, 4)]
"""(ranks, EP, SP)."""


def _run(ep: int, sp: int, rows: int = 4, **sections: Any) -> RunConfig:
    """Routers of wide weights, so that loads differ, and steps too small to change one: balances can take turns."""
    return tiny(
        parallel={"expert_parallel_size": ep, "sequence_parallel_size": sp},
        train={"micro_batch_size": rows, "optimizer": {"learning_rate": 1e-30}},
        model={"attention": {"num_heads": 4, "num_kv_heads": 4}, "init_std": 0.2},
        **sections,
    )


def _whole(run: RunConfig, step: int) -> list[Batch]:
    """All rows of a step, in its micro-batches."""
    return batches(run, Ranks(), step)


def _cut(run: RunConfig, ranks: Ranks) -> list[Batch]:
    """Sequences that count only at their end, only in their middle, nowhere, or up to the border of a part."""
    mask_BS = torch.ones(8, LENGTH, dtype=torch.bool)
    mask_BS[0, : LENGTH // 2] = False
    mask_BS[1, :5] = mask_BS[1, 8:] = False
    mask_BS[2] = False
    mask_BS[5, LENGTH // 4 :] = False
    mask_BS[6, : 3 * LENGTH // 4 + 1] = False
    size, rows = run.train.micro_batch_size, 8 // ranks.data_world_size
    mine = range(ranks.data_rank * rows, (ranks.data_rank + 1) * rows)
    return [
        Batch(b.input_ids_BS, b.labels_BS, mask_BS[at : at + size]).part(ranks.positions(LENGTH))
        for at, b in zip(range(0, 8, size), _whole(run, 1), strict=True)
        if at in mine
    ]


def _one_step(rank: int, world_size: int, folder: Path) -> None:
    for layout in LAYOUTS:
        if layout[0] != world_size:
            continue
        engine = start(_run(*layout[1:]), ranks_of(rank, *layout))
        for name, balance in BALANCES.items():
            engine.run = _run(*layout[1:], balance=balance)
            here = _cut(engine.run, engine.ranks)
            evaluated = [float(total) for total in engine.evaluate(here)]
            result = engine.step(here, 0)
            assert result.tokens_per_expert is not None
            terms = ("total", "cross_entropy", "load_balancing", "router_z", "gradient_norm")
            page = {
                "evaluated": evaluated,
                "terms": [float(getattr(result, term)) for term in terms],
                "counts": result.tokens_per_expert.tolist(),
            }
            (folder / f"{layout}-{name}-{rank}.json").write_text(json.dumps(page))
        engine.wrapped.destroy()


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    for world_size in (1, 4):
        run_ranks(_one_step, world_size, folder, world_size, folder)
    return folder


@pytest.mark.parametrize("name", BALANCES)
def test_losses_count_within_whole_sequences_wherever_they_are_cut(name: str, steps: Path) -> None:
    one = json.loads((steps / f"{LAYOUTS[0]}-{name}-0.json").read_text())
    assert one["terms"][2] > 1.1, "lopsided enough for a loss to tell"
    assert one["evaluated"][1] == 3 * LENGTH + LENGTH // 2 + 3 + LENGTH // 4 + LENGTH // 4 - 1
    for layout in LAYOUTS[1:]:
        for rank in range(layout[0]):
            found = json.loads((steps / f"{layout}-{name}-{rank}.json").read_text())
            assert found["counts"] == one["counts"], layout
            assert found["terms"] == pytest.approx(one["terms"], rel=1e-6), layout
            assert found["evaluated"] == pytest.approx(one["evaluated"], rel=1e-6), layout


def _held(model: Transformer, batch: Batch) -> int:
    """Bytes that a forward pass keeps for backward, each storage once; weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(batch.input_ids_BS, batch.labels_BS, batch.mask_BS)
    assert isinstance(output, ModelOutput)
    return sum(size for size, _ in kept.values())


def _measured(rank: int, folder: Path) -> None:
    """By the sharing among 1, 2 and 4 ranks; other ranks but the first do as it does."""
    run = _run(1, 1)
    for size in (1, 2, 4):
        ranks = ranks_of(rank, 4, 1, size)
        model = Transformer(run.model, sequence_group=SequenceGroup(size, ranks.sequence_group))
        initialize(model, run.seed)
        batch = _whole(run, 1)[0]
        everything = Batch(batch.input_ids_BS, batch.labels_BS, torch.ones_like(batch.mask_BS))
        held = _held(model, everything.part(ranks.positions(LENGTH)))
        if rank == 0:
            (folder / str(size)).write_text(str(held))


def test_what_is_kept_for_backward_shrinks_by_as_many_ranks(tmp_path: Path) -> None:
    """But for the gradient of the head [V, D] and the angles of all positions [S, d]; and heads are kept both before
    and after they travel back, where one rank needs them once."""
    run_ranks(_measured, 4, tmp_path, tmp_path)
    one, *parts = (int((tmp_path / str(size)).read_text()) for size in (1, 2, 4))
    fixed = 4 * (VOCAB * 32 + 2 * LENGTH * 8)
    travelled = 4 * 2 * 4 * LENGTH * 32
    assert one > 15 * max(fixed, travelled)
    assert parts == [fixed + (one - fixed + travelled) // size for size in (2, 4)]


class _Ear:
    """Stands for tracker and meter."""

    def __init__(self) -> None:
        self.heard: list[dict[str, float]] = []

    def evaluation(self, record: dict[str, float]) -> None:
        self.heard.append(record)

    def stopped(self) -> AbstractContextManager[None]:
        return nullcontext()


def _goes_on(rank: int, folder: Path) -> None:
    """Two steps with whole sequences, a save; two more from it, and two more in parts."""
    data = TokenData.open(folder / "data", verify=False)
    found = {}
    for sp in (1, 2):
        run = tiny(
            run_dir=str(folder / "run"),
            parallel={"expert_parallel_size": 2, "sequence_parallel_size": sp},
            train={"evaluate_every": 4},
        )
        engine, ear = start(run, ranks_of(rank, 2, 2, sp)), _Ear()
        state = restore(engine, data.fingerprint)
        if sp == 1:
            train(engine, 0, 2)
            state = TrainState(2, 2 * 8 * LENGTH)
            save(engine, state, data.fingerprint)
        assert state.step == 2
        rest = curve(train(engine, 2, 4))
        training._evaluate(run, data, engine, ear, TrainState(4, 0), ear)  # type: ignore[arg-type]  # stand-ins
        engine.wrapped.destroy()
        found[str(sp)] = {**vars(rest), "evaluation": ear.heard}
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_a_run_goes_on_with_shared_sequences_and_evaluates_the_same(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(4)
    documents = [torch.randint(2, VOCAB, (n,), generator=draw).tolist() for n in (70, 41, 93)]
    splits = {"train": documents, "validation": documents}
    raw_data(tmp_path / "data", splits, vocab_size=VOCAB, shard_tokens=10_000)
    run_ranks(_goes_on, 2, tmp_path, tmp_path)
    for rank in (0, 1):
        whole, parts = json.loads((tmp_path / f"{rank}.json").read_text()).values()
        assert parts["tokens_per_expert"] == whole["tokens_per_expert"]
        for term in ("total", "load_balancing", "gradient_norm"):
            assert parts[term] == pytest.approx(whole[term], rel=1e-6)
        (ours,), (reference,) = parts["evaluation"], whole["evaluation"]
        assert ours == pytest.approx(reference, rel=1e-6)
        assert reference["validation_loss"] > 1.0
