"""What sections must agree on: within a recipe, with the number of ranks, with the data."""

from typing import Protocol

from moe.config.model import ModelConfig, MoEConfig
from moe.config.run import BalanceConfig, RunConfig, ScheduleConfig
from moe.errors import ConfigError


def check(run: RunConfig) -> None:
    """Raise `ConfigError` with every contradiction inside the recipe."""
    _refuse(
        [
            *_attention(run.model),
            *_layers(run.model),
            *_experts(run.model),
            *_sequence(run),
            *_schedule(run),
            *_batch(run),
            *_parallel(run),
            *_balance(run),
        ]
    )


def check_world(run: RunConfig, world_size: int) -> int:
    """Gradient accumulation steps on `world_size` ranks; raises `ConfigError` if the layout cannot be."""
    ep, faults = run.parallel.expert_parallel_size, []
    if world_size % ep:
        faults.append(
            f"parallel.expert_parallel_size is {ep}, but there are {world_size} ranks: expert-parallel groups "
            f"must fill them evenly. Use one of {_divisors(world_size)}, or another number of ranks."
        )
    train = run.train
    per_pass = train.micro_batch_size * world_size
    if train.global_batch_size % per_pass:
        faults.append(
            f"train.global_batch_size is {train.global_batch_size}, but {world_size} ranks x "
            f"train.micro_batch_size {train.micro_batch_size} = {per_pass} sequences a pass: the batch must be "
            f"a multiple of it. Use a multiple of {per_pass}, or a smaller micro-batch."
        )
    _refuse(faults)
    return train.global_batch_size // per_pass


class DataFacts(Protocol):
    """What a prepared data folder says of itself."""

    @property
    def vocab_size(self) -> int: ...

    def num_tokens(self, split: str) -> int: ...


def check_data(run: RunConfig, data: DataFacts) -> None:
    """Raise `ConfigError` if the model or the batch does not fit the prepared data."""
    faults = []
    if run.model.vocab_size < data.vocab_size:
        faults.append(
            f"model.vocab_size is {run.model.vocab_size}, but the tokenizer of {run.data.path} has "
            f"{data.vocab_size} tokens: each needs a row. Set model.vocab_size={data.vocab_size} or more."
        )
    tokens, needed = data.num_tokens("train"), run.data.sequence_length + 1
    if tokens < needed:
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
    _refuse(faults)


def _attention(model: ModelConfig) -> list[str]:
    attention, faults = model.attention, []
    if attention.head_dim is None and model.hidden_size % attention.num_heads:
        faults.append(
            f"model.hidden_size is {model.hidden_size}, but model.attention.num_heads is {attention.num_heads}: "
            f"without head_dim, heads must divide the width. Use one of {_divisors(model.hidden_size)} heads, "
            f"or set model.attention.head_dim."
        )
    if attention.num_heads % model.num_kv_heads:
        faults.append(
            f"model.attention.num_kv_heads is {model.num_kv_heads}, but num_heads is {attention.num_heads}: "
            f"each key head must serve as many query heads. Use one of {_divisors(attention.num_heads)}."
        )
    if model.head_dim % 2:
        faults.append(
            f"model.attention.head_dim is {model.head_dim}: rotary embedding turns pairs, so it must be even. "
            f"Use {model.head_dim + 1}, or another width."
        )
    return faults


def _layers(model: ModelConfig) -> list[str]:
    dense = model.num_layers - len(model.sparse_layers)
    if dense and model.intermediate_size is None:
        return [
            f"model.intermediate_size is not set, but {dense} of {model.num_layers} layers are dense: they need "
            f"a width. Set model.intermediate_size, or make every layer sparse (model.moe, first_k_dense=0)."
        ]
    if not dense and model.intermediate_size is not None:
        return [
            f"model.intermediate_size is {model.intermediate_size}, but every layer is sparse, so it has no "
            f"effect. Remove it, or set model.moe.first_k_dense."
        ]
    return []


def _experts(model: ModelConfig) -> list[str]:
    moe, faults = model.moe, []
    if moe is None:
        return []
    if moe.top_k > moe.num_experts:
        faults.append(
            f"model.moe.top_k is {moe.top_k}, but model.moe.num_experts is {moe.num_experts}: a token visits "
            f"each expert once at most. Use a top_k of 1 to {moe.num_experts}."
        )
    if moe.normalize_top_k and moe.top_k == 1:
        faults.append(
            "model.moe.normalize_top_k is true, but model.moe.top_k is 1: the weight would always be 1 and the "
            "router would get no gradient. Set model.moe.normalize_top_k=false, or a top_k of 2 or more."
        )
    if moe.first_k_dense >= model.num_layers:
        faults.append(
            f"model.moe.first_k_dense is {moe.first_k_dense}, but model.num_layers is {model.num_layers}: no "
            f"layer would be sparse. Use {model.num_layers - 1} or less, or remove model.moe."
        )
    faults += _groups(moe)
    if moe.shared_expert_gate and moe.shared_expert_intermediate_size is None:
        faults.append(
            "model.moe.shared_expert_gate is true, but there is no shared expert, so it has no effect. Set "
            "model.moe.shared_expert_intermediate_size, or remove the gate."
        )
    return faults


def _groups(moe: MoEConfig) -> list[str]:
    groups, chosen = moe.num_expert_groups, moe.top_k_groups
    if (groups is None) != (chosen is None):
        return [
            f"model.moe.num_expert_groups is {groups} and model.moe.top_k_groups is {chosen}: group-limited choice "
            f"needs both. Set both, or neither."
        ]
    if groups is None or chosen is None:
        if moe.group_score != MoEConfig.model_fields["group_score"].default:
            return [
                f"model.moe.group_score is {moe.group_score}, but there are no groups, so it has no effect. "
                f"Remove it, or set model.moe.num_expert_groups."
            ]
        return []
    if moe.num_experts % groups:
        return [
            f"model.moe.num_expert_groups is {groups}, but model.moe.num_experts is {moe.num_experts}: groups must "
            f"be of equal size. Use one of {_divisors(moe.num_experts)}."
        ]
    size = moe.num_experts // groups
    if chosen > groups or chosen * size < moe.top_k:
        return [
            f"model.moe.top_k_groups is {chosen}: of {groups} groups of {size} experts, a token must be allowed "
            f"enough for its top_k of {moe.top_k}. Use {-(-moe.top_k // size)} to {groups}."
        ]
    if moe.group_score == "top2_sum" and size < 2:
        return [
            f"model.moe.group_score is top2_sum, but a group has {size} expert: there are no two to add. "
            f"Use group_score max, or fewer groups."
        ]
    return []


def _sequence(run: RunConfig) -> list[str]:
    length, longest = run.data.sequence_length, run.model.max_sequence_length
    if length > longest:
        return [
            f"data.sequence_length is {length}, but model.max_sequence_length is {longest}: the model would see "
            f"positions it does not declare. Use {longest} or less, or raise model.max_sequence_length."
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
            f"Use one of {_divisors(train.global_batch_size)}."
        ]
    return []


def _parallel(run: RunConfig) -> list[str]:
    parallel, moe, faults = run.parallel, run.model.moe, []
    ep = parallel.expert_parallel_size
    if moe is None and ep > 1:
        faults.append(
            f"parallel.expert_parallel_size is {ep}, but the model has no experts. Use 1, or add model.moe."
        )
    if moe is not None and moe.num_experts % ep:
        faults.append(
            f"parallel.expert_parallel_size is {ep}, but model.moe.num_experts is {moe.num_experts}: every rank "
            f"must hold the same number of experts. Use one of {_divisors(moe.num_experts)}."
        )
    if parallel.zero_stage == 0 and run.train.precision == "bf16":
        faults.append(
            "parallel.zero_stage is 0 with train.precision bf16: DeepSpeed then leaves experts out of the "
            "gradient norm and keeps no float32 master in step with the rest. Use zero_stage 1, or fp32."
        )
    return faults


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
    if balance.bias_update_rate and not moe.selection_bias:
        faults.append(
            f"balance.bias_update_rate is {balance.bias_update_rate}, but model.moe.selection_bias is false: there "
            f"is no bias to move. Set model.moe.selection_bias=true, or balance.bias_update_rate=0."
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
    return faults


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ConfigError("\n       ".join(faults))


def _divisors(number: int) -> str:
    found = [n for n in range(1, number + 1) if number % n == 0]
    return ", ".join(map(str, found if len(found) <= 16 else [*found[:8], "...", *found[-4:]]))
