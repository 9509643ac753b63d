"""A running engine -> checkpoints/step_N, while training goes on."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from moe import log
from moe.checkpoint import folder as folders
from moe.checkpoint import guarded, space
from moe.checkpoint import state as states
from moe.checkpoint.folder import Manifest
from moe.checkpoint.write import Snapshot, write
from moe.dist import beside
from moe.engine.engine import Engine
from moe.guard import Guard
from moe.metrics import Tracker
from moe.sparse.health import steps_since_use


@dataclass(frozen=True)
class TrainState:
    """How far a run is; with the weights and moments all that the next step depends on."""

    step: int = 0
    """Optimizer steps taken or skipped; fixes the learning rate and the position in the data too."""
    tokens: int = 0
    """Tokens trained on, masked ones included, those of skipped steps not."""
    steps_since_use_LE: Tensor | None = field(default=None, compare=False)
    """int64: steps that each expert of each sparse layer has gone without a token; None: none taken, or dense.
    For the records alone.
    """

    guard: Guard = field(default_factory=Guard)

    @property
    def updates(self) -> int:
        """How often the optimizer changed the weights."""
        return self.step - self.guard.skipped

    def after(
        self, num_tokens: int, tokens_per_expert: Tensor | None = None, guard: Guard | None = None
    ) -> "TrainState":
        """One step of `num_tokens` further; `tokens_per_expert`: int64 [L, E], of the global batch."""
        unused = self.steps_since_use_LE
        if tokens_per_expert is not None:
            unused = steps_since_use(unused, tokens_per_expert)
        return TrainState(self.step + 1, self.tokens + num_tokens, unused, guard or self.guard)

    def passed_over(self, guard: Guard) -> "TrainState":
        """One skipped step further."""
        return replace(self, step=self.step + 1, guard=guard)


def save(engine: Engine, state: TrainState, data_fingerprint: str) -> Path:
    """Write checkpoints/step_N and wait for it. Collective; returns its folder.

    Raises `CheckpointError` on all ranks if any could not write.
    """
    target = folders.step_folder(engine.run.folder, state.step)
    if not engine.ranks.gather(target.exists())[0]:
        write(engine.run, _snapshot(engine, state, data_fingerprint, HostCopies()), engine.ranks)
    return target


class Saver:
    """Saves a run's state, one save at a time. Make one with `open`.

    A save holds training only while this rank's part is copied to host memory. A thread hashes and writes the
    copies, agrees with the other ranks' threads over a group of its own, and renames. The same call on all ranks
    waits for it: the next `save`, or `finish`; what went wrong in the thread is raised there, on all of them.
    """

    def __init__(self, engine: Engine, data_fingerprint: str, newest: int, tracker: Tracker | None) -> None:
        self._engine, self._data_fingerprint = engine, data_fingerprint
        self._newest, self._tracker = newest, tracker
        self._ranks = beside(engine.ranks, engine.run.parallel.timeout_minutes)
        self._copies = HostCopies()
        self._job: _Job | None = None

    @classmethod
    @contextmanager
    def open(
        cls, engine: Engine, data_fingerprint: str, newest: int, tracker: Tracker | None = None
    ) -> Iterator["Saver"]:
        """A saver for a run whose newest checkpoint is of step `newest` (0: none). Collective.

        On the way out it waits for the save in flight, so that a run that fails elsewhere has it whole.
        """
        saver = cls(engine, data_fingerprint, newest, tracker)
        if engine.ranks.speaks and (sentence := space.caution(engine.run, newest)):
            log.get().warning(sentence)
        try:
            yield saver
        except BaseException:
            if (job := saver._job) is not None:
                job.thread.join()
                if job.error is not None:
                    log.get().warning("the save of step %d failed too: %s", job.step, job.error)
            raise
        saver.settle()

    def save(self, state: TrainState) -> None:
        """Save `state`, which the engine is in. Collective."""
        self.settle()
        began = time.perf_counter()
        engine = self._engine
        target = folders.step_folder(engine.run.folder, state.step)
        if engine.ranks.gather(target.exists())[0]:
            self._newest = state.step
            return  # a run that went on from an older checkpoint comes by again: the same state
        mine = _snapshot(engine, state, self._data_fingerprint, self._copies)
        self._job = job = _Job(state.step, lambda: write(engine.run, mine, self._ranks))
        job.thread.start()
        job.held = time.perf_counter() - began
        if not engine.run.checkpoint.asynchronous:
            self.settle()

    def poll(self) -> bool:
        """Report a save that has ended meanwhile; whether it failed: then all ranks must `finish`."""
        job = self._job
        if job is not None and job.manifest is not None:
            self.settle()
        return job is not None and job.error is not None

    def finish(self, state: TrainState) -> None:
        """Wait for the save in flight, and save `state` if it is not yet. Collective."""
        self.settle()
        if state.step not in (0, self._newest):
            self.save(state)
            self.settle()

    def settle(self) -> None:
        """Wait for the save in flight, on all ranks."""
        job, self._job = self._job, None
        if job is None:
            return
        began = time.perf_counter()
        job.thread.join()
        if job.error is not None:
            raise job.error
        assert job.manifest is not None
        self._newest = job.step
        held = job.held + time.perf_counter() - began
        if self._tracker is not None:
            self._tracker.checkpoint(
                {
                    "step": job.step,
                    "checkpoint_bytes": job.manifest.num_bytes,
                    "checkpoint_held_seconds": held,
                    "checkpoint_write_seconds": job.seconds,
                }
            )


class HostCopies:
    """Host memory for this rank's part of a state, kept from save to save; pinned where tensors are on a GPU."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copies of `tensors` by key; those of the last call are overwritten."""
        taken = {}
        for key, tensor in tensors:
            kept = self._kept.get(key)
            if kept is None or kept.shape != tensor.shape:
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            taken[key] = kept.copy_(tensor, non_blocking=True)
        if any(tensor.is_pinned() for tensor in taken.values()):
            torch.cuda.synchronize()
        self._kept = taken
        return taken


class _Job:
    """A save that a thread writes."""

    def __init__(self, step: int, work: Callable[[], Manifest]) -> None:
        self.step = step
        self.held = self.seconds = 0.0
        self.manifest: Manifest | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)

    def _run(self, work: Callable[[], Manifest]) -> None:
        began = time.perf_counter()
        try:
            manifest = work()
            self.seconds = time.perf_counter() - began
            self.manifest = manifest
        except BaseException as error:
            self.error = error


def _snapshot(engine: Engine, state: TrainState, data_fingerprint: str, copies: HostCopies) -> Snapshot:
    """This rank's part, copied. Collective."""
    if not state.updates:
        states.prepare(engine, 0)  # every step was skipped, so the optimizer has made no moments yet

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from states.collect(engine)
        if engine.ranks.speaks:
            yield from guarded.tensors(state.guard).items()
            if state.steps_since_use_LE is not None:
                yield states.STEPS_SINCE_USE, state.steps_since_use_LE

    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    return Snapshot(state.step, state.tokens, data_fingerprint, copies.take(tensors()), rng)
