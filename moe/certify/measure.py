"""A small recipe in a layout -> what a few steps of its training did, as plain tensors and numbers.

Gradients are not looked at: what the optimizer remembers of them is, weight by weight and expert by expert, since that
is what every ZeRO stage has whole, and what training goes on from.
"""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from moe.certify.layouts import Layout
from moe.certify.seen import Job, Seen, State, Step
from moe.checkpoint import state as states
from moe.checkpoint.resume import restore
from moe.checkpoint.save import TrainState, save
from moe.config import RunConfig
from moe.data.loader import Batch
from moe.dist import Ranks, consecutive
from moe.engine.build import build
from moe.engine.engine import Engine
from moe.engine.groups import is_expert
from moe.engine.result import StepResult
from moe.seed import stream

FINGERPRINT = "certify"
"""Stands for the data's in checkpoints."""


def observe(job: Job, ranks: Ranks) -> Seen:
    """Train; what was seen is whole on the first rank. Collective."""
    engine = start(job.run, ranks)
    if job.first:
        restore(engine, FINGERPRINT)
    else:
        states.prepare(engine, 0)  # else there are no moments to look at yet
    before = _state(engine)
    steps = []
    for number in range(job.first, job.last):
        result = engine.step(batches(job.run, ranks, number, job.padding), number)
        steps.append(_step(engine, result, number))
        if job.save_at == number + 1:
            save(engine, TrainState(number + 1), FINGERPRINT)
    engine.wrapped.destroy()
    return Seen(before, tuple(steps), job.first)


def start(run: RunConfig, ranks: Ranks) -> Engine:
    """A fresh engine."""
    return Engine.start(run, build(run, ranks), ranks)


def ranks_of(rank: int, layout: Layout, device: torch.device) -> Ranks:
    """Ranks within a group that stands already. Collective."""
    return Ranks(
        rank=rank,
        world_size=layout.world,
        local_rank=rank,
        device=device,
        expert_parallel_size=layout.ep,
        expert_group=consecutive(layout.ep),
        sequence_parallel_size=layout.sp,
        sequence_group=consecutive(layout.sp),
        control_group=dist.new_group(backend="gloo"),
    )


def batches(run: RunConfig, ranks: Ranks, step: int, padding: int = 0) -> list[Batch]:
    """This rank's micro-batches of a sequence that can be learned, x' = 3 x + 1 mod vocabulary, with noise."""
    ids_BS, labels_BS, mask_BS = _whole(run, step, padding)
    mine = len(ids_BS) // ranks.data_world_size
    size = run.train.micro_batch_size
    whole = [
        Batch(ids_BS[a : a + size], labels_BS[a : a + size], mask_BS[a : a + size])
        for a in range(ranks.data_rank * mine, (ranks.data_rank + 1) * mine, size)
    ]
    return [batch.part(ranks.positions(run.data.sequence_length)) for batch in whole]


def _whole(run: RunConfig, step: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and mask of the global batch; `padding` is added where nothing counts."""
    draw = stream("certify", run.seed, step)
    rows, length, vocab = run.train.global_batch_size, run.data.sequence_length, run.model.vocab_size
    ids = torch.empty(rows, length + 1, dtype=torch.int64)
    ids[:, 0] = torch.randint(vocab, (rows,), generator=draw)
    for s in range(length):
        noise = torch.randint(vocab, (rows,), generator=draw)
        follows = (ids[:, s] * 3 + 1) % vocab
        ids[:, s + 1] = torch.where(torch.rand(rows, generator=draw) < 0.1, noise, follows)
    mask = mask_of(run, step)
    inputs, labels = ids[:, :-1].clone(), ids[:, 1:].clone()
    for tensor in (inputs, labels):
        tensor[~mask] = (tensor[~mask] + padding) % vocab
    return inputs, labels, mask


def mask_of(run: RunConfig, step: int) -> Tensor:
    """Bool [B, S]: all tokens count but for half a row and, at every other step, a whole one; in the last step only
    two tokens do, so that most experts get none. What does not count comes last: no token that counts attends to it.
    """
    mask = torch.ones(run.train.global_batch_size, run.data.sequence_length, dtype=torch.bool)
    if step == run.train.steps - 1:
        mask[:] = False
        mask[0, :2] = True
        return mask
    mask[0, (run.data.sequence_length + 1) // 2 :] = False
    if step % 2:
        mask[-1] = False
    return mask


def _step(engine: Engine, result: StepResult, number: int) -> Step:
    counts, norms = result.tokens_per_expert, engine.ranks.gather(float(result.gradient_norm))
    return Step(
        total=float(result.total),
        cross_entropy=float(result.cross_entropy),
        load_balancing=float(result.load_balancing),
        router_z=float(result.router_z),
        further=float(result.further),
        gradient_norm=norms[0],
        gradient_norms=tuple(norms),
        unequal=_unequal(engine),
        learning_rate=result.learning_rate,
        num_tokens=int(mask_of(engine.run, number).sum()),
        tokens_per_expert=None if counts is None else counts.cpu(),
        state=_state(engine),
    )


def _unequal(engine: Engine) -> str:
    """The first parameter whose copies, on ranks that should hold the same, differ. Collective.

    A stacked parameter's copies lie on ranks of equal position in their expert-parallel groups.
    """
    marks = [
        (name, engine.ranks.expert_rank if is_expert(parameter) else 0, _mark(parameter))
        for name, parameter in engine.model.named_parameters()
    ]
    for copies in zip(*engine.ranks.gather(marks), strict=True):
        if len(set(copies)) > len({place for _, place, _ in copies}):
            name: str = copies[0][0]
            return name
    return ""


def _mark(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _state(engine: Engine) -> State:
    """The whole state, each tensor once, in the same order everywhere. Collective."""
    mine = {key: tensor.to("cpu", copy=True) for key, tensor in states.collect(engine)}
    parts = engine.ranks.gather(mine)
    whole = {key: tensor for part in parts for key, tensor in part.items()}
    return {key: whole[key] for key in sorted(whole)}
