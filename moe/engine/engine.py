"""Micro-batches -> one optimizer step, the same on every layout.

L sparse layers, E experts.
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from moe import loss, optim
from moe.config import RunConfig, check_world
from moe.data.loader import Batch
from moe.dist import Ranks
from moe.engine import ds_config
from moe.engine.clip import clip_gradients
from moe.engine.gate import Gate
from moe.engine.groups import adopt
from moe.engine.library import deepspeed
from moe.engine.partition import homes, show_partitions
from moe.engine.result import StepResult
from moe.errors import TrainingError
from moe.guard import Guard
from moe.loss import Losses, Totals
from moe.model import ModelOutput, Transformer
from moe.seed import number
from moe.sparse import Jitter, balance, health
from moe.sparse.health import Sample

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer  # isort: skip


class Engine:
    """A model under DeepSpeed. Make one with `start`."""

    def __init__(self, run: RunConfig, ranks: Ranks, model: Transformer, wrapped: Any) -> None:
        self.run = run
        self.ranks = ranks
        self.model = model
        self.wrapped = wrapped
        """DeepSpeed's engine."""
        self.homes = homes(wrapped.optimizer, run.parallel.zero_stage, model)
        self._gate = None
        if run.train.guard.skips:
            self._gate = Gate(getattr(wrapped.optimizer, "optimizer", wrapped.optimizer))

    @classmethod
    def start(cls, run: RunConfig, model: Transformer, ranks: Ranks) -> "Engine":
        """Hand an initialised model to DeepSpeed. Collective; raises `ConfigError` if the layout cannot be."""
        accumulation = check_world(run, ranks.world_size)
        config = ds_config.make(run, accumulation)
        os.environ.setdefault(
            "LOCAL_RANK", str(ranks.local_rank)
        )  # DeepSpeed insists; srun and plain python have none
        adopt(model)

        def optimizer(_: Iterable[Any]) -> torch.optim.Optimizer:
            groups = optim.parameter_groups(model, run.train.optimizer)
            groups = split_params_into_different_moe_groups_for_optimizer(groups)
            return optim.make([group for group in groups if group["params"]], model, run.train)

        wrapped, *_ = deepspeed.initialize(
            model=model,
            model_parameters=list(model.parameters()),
            optimizer=optimizer,
            config=config,
            dist_init_required=False,
        )
        engine = cls(run, ranks, model, wrapped)
        show_partitions(wrapped.optimizer, engine.homes)
        return engine

    def step(
        self, batches: Sequence[Batch], step: int, *, observe: bool = False, guard: Guard | None = None
    ) -> StepResult:
        """Forward, backward and update over this rank's micro-batches of optimizer step `step` (from 0).

        Ranks that share sequences bring the same rows, each its own positions of them (`Ranks.positions`).
        With `observe` the health of the sparse layers is looked at too, for one more collective. If the recipe
        lets steps be skipped, `guard` is what it knows of the steps before, and no weight, moment or bias changes in
        one that it finds at fault.

        Collective. All shares are scaled so that DeepSpeed's mean over ranks and micro-batches gives back the
        gradient of the mean over the global batch's unmasked tokens.
        """
        batches = [batch.on(self.ranks.device) for batch in batches]
        self.wrapped.train()
        jitters = self._jitters(batches, step)
        totals = self._totals(batches, jitters)
        rate = optim.learning_rate(self.run.train, step)
        for group in self.wrapped.optimizer.param_groups:
            group["lr"] = rate
        sums = torch.zeros(5, dtype=torch.float64, device=self.ranks.device)
        load, norm, sample, reduced = None, None, None, None
        guard = guard or Guard()
        for batch, jitter in zip(batches, jitters, strict=True):
            output = self.wrapped(*batch.inputs(jitter))
            here = self._losses(output, batch, totals)
            self.wrapped.backward(here.total * (self.ranks.world_size * len(batches)))
            sums += here.terms()
            load_here = loss.local_load(output)
            load = load_here if load is None or load_here is None else load + load_here
            if observe and output.records:
                sample = health.observe(output.records, batch.mask_BS.flatten()).joined(sample)
            if batch is batches[-1]:
                if self.run.parallel.zero_stage == 0:
                    norm = clip_gradients(self.model, self.ranks, self.run.train.optimizer.gradient_clipping)
                if self._gate is not None:
                    # Already now, since its loss may shut the gate.
                    reduced = self._reduced(sums, load, sample)
                    self._gate.ask(partial(self._may_update, guard, reduced[0], norm))
                elif norm is not None:
                    self._refuse_divergence(step, norm)
            self.wrapped.step()
        if norm is None:
            norm = torch.as_tensor(self.wrapped.get_global_grad_norm())
        if reduced is None:
            self._refuse_divergence(step, norm)
            reduced = self._reduced(sums, load, sample)
        terms, load, seen = reduced
        fault, guard = self._verdict(guard, step, terms, norm)
        found = None
        if sample is not None and seen is not None:
            sample = Sample(seen, self.ranks.max(sample.maxima_L2))
            found = health.summarize(sample, totals.num_tokens, self.model.selection_biases())
        if load is not None and not fault:
            self._move_biases(load[:, :-1])
        cross_entropy, load_balancing, router_z, further, total = terms.unbind()
        return StepResult(
            cross_entropy=cross_entropy,
            load_balancing=load_balancing,
            router_z=router_z,
            further=further,
            total=total,
            gradient_norm=norm,
            learning_rate=rate,
            num_tokens=self.run.train.global_batch_size * self.run.data.sequence_length,
            tokens_per_expert=load[:, :-1] if load is not None else None,
            num_dropped=load[:, -1] if load is not None else None,
            health=found,
            guard=guard,
            fault=fault,
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """(nats, tokens) summed over all ranks; float64 scalars. Every rank must bring as many batches."""
        self.wrapped.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        for batch in batches:
            batch = batch.on(self.ranks.device)
            output = self.model(*batch.inputs())
            sums += torch.stack([output.cross_entropy.double(), batch.predicted().sum().double()])
        nats, tokens = self.ranks.sum(sums).unbind()
        return nats, tokens

    def _jitters(self, batches: Sequence[Batch], step: int) -> list[Jitter | None]:
        """Noise for each micro-batch by its place in the global batch: moe.data.loader deals rows in that order."""
        epsilon, sharing = self.run.balance.router_jitter, self.ranks.sequence_parallel_size
        if not epsilon:
            return [None] * len(batches)
        shapes = [(batch.mask_BS.shape[0], batch.mask_BS.shape[1] * sharing) for batch in batches]
        sizes = [rows * length for rows, length in shapes]
        key = number("router jitter", self.run.seed, step)
        firsts = accumulate(sizes[:-1], initial=self.ranks.data_rank * sum(sizes))
        places = [range(first, first + size) for first, size in zip(firsts, sizes, strict=True)]
        whole = [Jitter.of(epsilon, key, here, self.ranks.device) for here in places]
        return [
            jitter.part(rows, self.ranks.positions(length))
            for jitter, (rows, length) in zip(whole, shapes, strict=True)
        ]

    def _totals(self, batches: Sequence[Batch], jitters: Sequence[Jitter | None]) -> Totals:
        counts = None
        if self._needs_global_counts() and len(batches) > 1:
            # The load of the whole batch must be known before the first backward: count it in a pass of its own.
            with torch.no_grad():
                pairs = zip(batches, jitters, strict=True)
                outputs = [self.model(*batch.inputs(noise)) for batch, noise in pairs]
            loads = [loss.local_load(output) for output in outputs]
            counts = torch.stack([load[:, :-1] for load in loads if load is not None]).sum(0)
        masks = [batch.mask_BS for batch in batches]
        tokens_B = self.ranks.sum_over_sequence(torch.cat([mask.sum(1) for mask in masks]))
        predictions = _sum(batch.predicted().sum() for batch in batches)
        sizes = torch.stack([_sum(mask.sum() for mask in masks), (tokens_B > 0).sum(), predictions]).double()
        tokens, sequences, predictions = self.ranks.sum(sizes).unbind()
        sequences = sequences / self.ranks.sequence_parallel_size  # which all those that share them counted
        # Sums over nothing are 0, and so are their means.
        tokens, sequences, predictions = (total.clamp(min=1) for total in (tokens, sequences, predictions))
        micro_batches = len(batches) * self.ranks.data_world_size
        return Totals(
            tokens,
            sequences,
            micro_batches,
            self.ranks.sum(counts) if counts is not None else None,
            predictions,
        )

    def _losses(self, output: ModelOutput, batch: Batch, totals: Totals) -> Losses:
        if self._needs_global_counts() and totals.counts_LE is None:
            load = loss.local_load(output)
            assert load is not None
            totals = replace(totals, counts_LE=self.ranks.sum(load[:, :-1].contiguous()))
        return loss.losses(
            output,
            batch.mask_BS,
            totals,
            self.run.balance,
            self._choices(output, batch),
            self.run.train.prediction_loss_weight,
        )

    def _choices(self, output: ModelOutput, batch: Batch) -> Tensor | None:
        """Of whole sequences, for losses that count within them; None: they are whole here, or nothing counts."""
        config = self.run.balance
        if self.ranks.sequence_parallel_size == 1 or not output.records:
            return None
        if not (config.sequence_loss_weight or config.micro_batch_loss_weight):
            return None
        return self.ranks.sum_over_sequence(loss.choices(output, batch.mask_BS))

    def _reduced(
        self, sums: Tensor, load: Tensor | None, sample: Sample | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of all ranks, in one collective."""
        terms, load, seen = self.ranks.sum_all(sums, load, sample.sums_LM if sample is not None else None)
        assert terms is not None
        return terms, load, seen

    def _may_update(self, guard: Guard, terms: Tensor, norm: Tensor | None) -> bool:
        """Asked when the norm is known and nothing has changed; all ranks have the same numbers."""
        norm = self.wrapped.optimizer._global_grad_norm if norm is None else norm
        return not guard.fault(self.run.train.guard, _watched(terms), float(norm))

    def _verdict(self, guard: Guard, step: int, terms: Tensor, norm: Tensor) -> tuple[str, Guard]:
        """Why the update was not made, if it was not, and the guard after this step."""
        config = self.run.train.guard
        if (
            self._gate is None
        ):  # values are not looked at, nor waited for; what an earlier guard knew grows stale
            return "", guard.taken(config, math.nan, math.nan)
        seen = _watched(terms), float(norm)
        if config.non_finite == "stop":
            self._refuse_divergence(step, norm, seen[0])
        return guard.fault(config, *seen), guard.after(config, *seen)

    def _refuse_divergence(self, step: int, norm: Tensor, watched: float = 0.0) -> None:
        """Stop before a bad gradient touches weights; DeepSpeed itself would skip the step and say little.

        DeepSpeed looks for overflow on the host at every step, so this adds no wait. Raises `TrainingError`.
        """
        what = "" if math.isfinite(watched) else "loss"
        if getattr(self.wrapped.optimizer, "overflow", False) or not math.isfinite(norm):
            what = "gradient"
        if what:
            raise TrainingError(
                f"the {what} of step {step + 1} is not finite: training has diverged, and weights would be lost. "
                f"Checkpoints are as they were. Start again with a lower train.optimizer.learning_rate or a longer "
                f"train.schedule.warmup_steps (a new run_dir), look at the data around that step, or go on from the "
                f"last checkpoint without such steps by train.guard.non_finite=skip.",
                step + 1,
            )

    def _needs_global_counts(self) -> bool:
        return self.run.model.moe is not None and self.run.balance.global_batch_loss_weight > 0

    @torch.no_grad()
    def _move_biases(self, counts_LE: Tensor) -> None:
        """Once a step, from exact counts that all ranks share, so that biases stay equal everywhere."""
        rate, rule = self.run.balance.bias_update_rate, self.run.balance.bias_update
        if not rate:
            return
        for bias_E, counts_E in zip(self.model.selection_biases(), counts_LE, strict=True):
            bias_E += balance.bias_step(counts_E, rate, rule)


def _watched(terms: Tensor) -> float:
    """The loss that a guard looks at: the cross-entropy, or all that is differentiated if that is not finite."""
    cross_entropy, *_, total = terms.tolist()
    return float(cross_entropy if math.isfinite(total) else total)


def _sum(values: Iterable[Tensor]) -> Tensor:
    """Sum of scalar tensors."""
    return torch.stack(list(values)).sum()
