"""What sections must agree on: within a recipe, with the number of ranks, with the data."""

import math
from typing import Protocol

from moe.config.base import refuse
from moe.config.guard import guard_faults
from moe.config.lora import lora_faults
from moe.config.mixture import mixture_faults
from moe.config.numbers import choice, divisors
from moe.config.parallel import parallel_faults
from moe.config.run import BalanceConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from moe.config.sequence import sequence_faults, sequence_sizes
from moe.config.shape import shape_faults


def check(run: RunConfig) -> None:
    """Raise `ConfigError` with every contradiction inside the recipe."""
    refuse(
        [
            *shape_faults(run.model),
            *_sequence(run),
            *mixture_faults(run.data.mixture, run.train.steps),
            *_optimizer(run),
            *_schedule(run),
            *guard_faults(
                run.train.guard,
                steps=run.train.steps,
                checkpoint_every=run.checkpoint.every_steps,
                offload=run.parallel.offload,
            ),
            *_batch(run),
            *_recomputation(run),
            *_prediction(run),
            *parallel_faults(run),
            *sequence_faults(run),
            *_balance(run),
            *lora_faults(run.lora, run.model, run.balance.bias_update_rate),
            *_checkpoint(run),
        ]
    )


def _recomputation(run: RunConfig) -> list[str]:
    if run.train.activation_recomputation == "experts" and run.model.moe is None:
        return [
            "train.activation_recomputation is experts, but the model is dense, so it has no effect. Use none or "
            "block, or set model.moe."
        ]
    return []


def _prediction(run: RunConfig) -> list[str]:
    depth, weight = run.model.prediction_depth, run.train.prediction_loss_weight
    if not depth and weight != TrainConfig.model_fields["prediction_loss_weight"].default:
        return [
            f"train.prediction_loss_weight is {weight}, but model.prediction_depth is 0, so it has no effect. Remove "
            f"it, or set model.prediction_depth."
        ]
    if depth and not weight:
        return [
            f"train.prediction_loss_weight is 0, but model.prediction_depth is {depth}: its modules would learn "
            f"nothing. Set a weight, or model.prediction_depth=0."
        ]
    return []


def check_world(run: RunConfig, world_size: int) -> int:
    """Gradient accumulation steps on `world_size` ranks; raises `ConfigError` if the layout cannot be."""
    ep, moe = run.parallel.expert_parallel_size, run.model.moe
    faults = []
    if world_size % ep:
        fitting = divisors(math.gcd(world_size, moe.num_experts) if moe else 1)
        faults.append(
            f"parallel.expert_parallel_size is {ep}, but there {'is' if world_size == 1 else 'are'} "
            f"{_ranks(world_size)}: expert-parallel groups must fill them evenly. "
            f"Use {choice(fitting)}, or start a multiple of {ep} ranks."
        )
    train, sharing = run.train, run.parallel.sequence_parallel_size
    if world_size % sharing:
        fitting = [size for size in sequence_sizes(run) if world_size % size == 0]
        faults.append(
            f"parallel.sequence_parallel_size is {sharing}, but there {'is' if world_size == 1 else 'are'} "
            f"{_ranks(world_size)}: the groups that share sequences must fill them evenly. "
            f"Use {choice(fitting)}, or start a multiple of {sharing} ranks."
        )
        refuse(faults)
    per_pass = train.micro_batch_size * world_size // sharing
    if train.global_batch_size % per_pass:
        shared = f" / parallel.sequence_parallel_size {sharing}" if sharing > 1 else ""
        faults.append(
            f"train.global_batch_size is {train.global_batch_size}, but {_ranks(world_size)}{shared} x "
            f"train.micro_batch_size {train.micro_batch_size} = {per_pass} sequences a pass: the batch must be "
            f"a multiple of it. Use a multiple of {per_pass}, or {_instead(run, world_size // sharing)}."
        )
    refuse(faults)
    return train.global_batch_size // per_pass


def _ranks(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"


def _instead(run: RunConfig, groups: int) -> str:
    """What would fit the same batch: a smaller micro-batch, where groups divide it at all, or other ranks."""
    batch, micro, parallel = run.train.global_batch_size, run.train.micro_batch_size, run.parallel
    if batch % groups == 0:
        return f"a train.micro_batch_size of {choice(divisors(batch // groups))}"
    ranks = [groups * parallel.sequence_parallel_size for groups in divisors(batch // micro)]
    fitting = [number for number in ranks if number % parallel.expert_parallel_size == 0]
    return f"another number of ranks ({choice(fitting)})" if fitting else "another number of ranks"


class DataFacts(Protocol):
    """What a prepared data folder says of itself."""

    @property
    def vocab_size(self) -> int: ...

    def num_tokens(self, split: str) -> int: ...

    def longest_conversation(self) -> int | None: ...


def check_data(run: RunConfig, data: DataFacts) -> None:
    """Raise `ConfigError` if the model or the batch does not fit the prepared data."""
    faults = []
    if run.model.vocab_size < data.vocab_size:
        faults.append(
            f"model.vocab_size is {run.model.vocab_size}, but the tokenizer of {run.data.path} has "
            f"{data.vocab_size} tokens: each needs a row. Set model.vocab_size={data.vocab_size} or more."
        )
    tokens, needed = data.num_tokens("train"), run.data.sequence_length + 1
    if (longest := data.longest_conversation()) is not None:
        faults += _longest(run, longest)
    elif tokens < needed and run.data.mixture is None:
        faults.append(
            f"data.sequence_length is {run.data.sequence_length}, but the training split of {run.data.path} has "
            f"{tokens} tokens: it must hold at least one sequence and its next token. "
            f"Use data.sequence_length={max(tokens - 1, 1)} or less, or prepare more text."
        )
    if run.train.evaluate_every and not data.num_tokens("validation"):
        faults.append(
            f"train.evaluate_every is {run.train.evaluate_every}, but {run.data.path} has no validation split. "
            f"Prepare it with validation.fraction above 0, or remove train.evaluate_every."
        )
    refuse(faults)


def _longest(run: RunConfig, longest: int) -> list[str]:
    length = run.data.sequence_length
    if longest <= length + 1:
        return []
    return [
        f"data.sequence_length is {length}, but the longest conversation of {run.data.path} has {longest} tokens: none "
        f"is cut. Use data.sequence_length={longest - 1} or more, or prepare with a max_tokens of the chat source."
    ]


def _sequence(run: RunConfig) -> list[str]:
    length, longest = run.data.sequence_length, run.model.max_sequence_length
    if length > longest:
        return [
            f"data.sequence_length is {length}, but model.max_sequence_length is {longest}: the model would see "
            f"positions it does not declare. Use {longest} or less, or raise model.max_sequence_length."
        ]
    return []


def _optimizer(run: RunConfig) -> list[str]:
    momentum = run.train.optimizer.momentum
    if run.train.optimizer.kind == "adamw" and momentum != OptimizerConfig.model_fields["momentum"].default:
        return [
            f"train.optimizer.momentum is {momentum}, but kind is adamw, whose moments decay by beta1 and beta2, so "
            f"it has no effect. Remove it, or use kind muon."
        ]
    return []


def _schedule(run: RunConfig) -> list[str]:
    schedule, steps, faults = run.train.schedule, run.train.steps, []
    if schedule.warmup_steps > steps:
        faults.append(
            f"train.schedule.warmup_steps is {schedule.warmup_steps}, but train.steps is {steps}: the warm-up "
            f"must end within the run. Use {steps} or less."
        )
    if (schedule.kind == "wsd") != (schedule.decay_steps is not None):
        faults.append(
            f"train.schedule.decay_steps is {schedule.decay_steps} with kind {schedule.kind}: it belongs to wsd, "
            f"which needs it. Set both, or neither."
        )
    if schedule.kind == "constant" and schedule.final_fraction != ScheduleConfig().final_fraction:
        faults.append(
            "train.schedule.final_fraction is set, but kind constant never decays, so it has no effect. "
            "Remove it, or use kind cosine or wsd."
        )
    if schedule.decay_steps and schedule.warmup_steps + schedule.decay_steps > steps:
        faults.append(
            f"train.schedule: warmup_steps {schedule.warmup_steps} + decay_steps {schedule.decay_steps} is more "
            f"than train.steps {steps}. Shorten one of them."
        )
    return faults


def _batch(run: RunConfig) -> list[str]:
    train = run.train
    if train.global_batch_size % train.micro_batch_size:
        return [
            f"train.global_batch_size is {train.global_batch_size}, but train.micro_batch_size is "
            f"{train.micro_batch_size}: the batch must be made of whole micro-batches. "
            f"Use {choice(divisors(train.global_batch_size))}."
        ]
    return []


def _balance(run: RunConfig) -> list[str]:
    balance = run.balance
    if run.model.moe is None and balance != BalanceConfig():
        return [
            "balance is set, but the model has no experts, so it has no effect. "
            "Remove the balance section, or add model.moe."
        ]
    faults, moe, default = [], run.model.moe, BalanceConfig()
    if moe is None:
        return []
    if moe.router_choice != "token":
        faults += _equal_loads(balance, moe.router_choice)
    if balance.bias_update_rate and not moe.selection_bias:
        faults.append(
            f"balance.bias_update_rate is {balance.bias_update_rate}, but model.moe.selection_bias is false: there "
            f"is no bias to move. Set model.moe.selection_bias=true, or balance.bias_update_rate=0."
        )
    learned = run.init_from is not None or run.lora is not None
    if moe.selection_bias and not balance.bias_update_rate and not learned:
        faults.append(
            "model.moe.selection_bias is true, but balance.bias_update_rate is 0: the bias starts at zero and "
            "nothing would move it, so it has no effect. Set balance.bias_update_rate (such as 0.001), "
            "or remove model.moe.selection_bias."
        )
    if not balance.bias_update_rate and balance.bias_update != default.bias_update:
        faults.append(
            f"balance.bias_update is {balance.bias_update}, but bias_update_rate is 0, so it has no effect. "
            f"Remove it, or give the bias a rate."
        )
    if balance.capacity_factor is None and balance.drop_by != default.drop_by:
        faults.append(
            f"balance.drop_by is {balance.drop_by}, but there is no capacity_factor, so nothing is dropped. "
            f"Remove it, or set balance.capacity_factor."
        )
    chosen = moe.router_choice == "token"
    if chosen and balance.capacity_factor and balance.capacity_factor * moe.top_k >= moe.num_experts:
        faults.append(
            f"balance.capacity_factor is {balance.capacity_factor:g}, but with top_k {moe.top_k} of {moe.num_experts} "
            f"experts no load can be more than {moe.num_experts / moe.top_k:g} times the mean, so nothing would ever "
            f"be dropped. Use a smaller factor, or balance.capacity_factor=null."
        )
    return faults


def _equal_loads(balance: BalanceConfig, chosen: str) -> list[str]:
    """What balances loads, or limits them, is of no use where they are equal by construction."""
    off = {
        "sequence_loss_weight": "0",
        "micro_batch_loss_weight": "0",
        "global_batch_loss_weight": "0",
        "capacity_factor": "null",
    }
    return [
        f"balance.{key} is {getattr(balance, key)}, but model.moe.router_choice is {chosen}: experts of a micro-batch "
        f"have equal loads by construction, so there is nothing to balance or to limit. Set balance.{key}={none}, or "
        f"use router_choice token."
        for key, none in off.items()
        if getattr(balance, key)
    ]


def _checkpoint(run: RunConfig) -> list[str]:
    every, keep, milestone = (
        run.checkpoint.every_steps,
        run.checkpoint.keep,
        run.checkpoint.keep_every,
    )
    if milestone is None:
        return []
    if keep is None:
        return [
            f"checkpoint.keep_every is {milestone}, but checkpoint.keep is null: all are kept, so it has no effect. "
            f"Set checkpoint.keep, or remove checkpoint.keep_every."
        ]
    if every is None or milestone % every:
        return [
            f"checkpoint.keep_every is {milestone}, but checkpoint.every_steps is {every}: milestones must be steps "
            f"that are saved. Use a multiple of checkpoint.every_steps, and set that."
        ]
    return []
