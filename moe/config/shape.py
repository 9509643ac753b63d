"""What the settings of a model must agree on."""

import math

from moe.config.model import ModelConfig, MoEConfig


def shape_faults(model: ModelConfig) -> list[str]:
    """Every contradiction inside the model, a line each."""
    return [*_attention(model), *_layers(model), *_experts(model)]


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def choice(numbers: list[int]) -> str:
    """The numbers that would do, as a person reads them."""
    if len(numbers) == 1:
        return str(numbers[0])
    shown = numbers if len(numbers) <= 16 else [*numbers[:8], "...", *numbers[-4:]]
    return f"one of {', '.join(map(str, shown))}"


def _attention(model: ModelConfig) -> list[str]:
    attention, faults = model.attention, []
    if attention.head_dim is None and model.hidden_size % attention.num_heads:
        faults.append(
            f"model.hidden_size is {model.hidden_size}, but model.attention.num_heads is {attention.num_heads}: "
            f"without head_dim, heads must divide the width. Use {choice(divisors(model.hidden_size))} heads, "
            f"or set model.attention.head_dim."
        )
    if attention.num_heads % model.num_kv_heads:
        faults.append(
            f"model.attention.num_kv_heads is {model.num_kv_heads}, but num_heads is {attention.num_heads}: "
            f"each key head must serve as many query heads. Use {choice(divisors(attention.num_heads))}."
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
    if moe.latent_size is not None and moe.latent_size >= model.hidden_size:
        faults.append(
            f"model.moe.latent_size is {moe.latent_size}, but model.hidden_size is {model.hidden_size}: the latent "
            f"width saves work only where it is smaller. Use less than {model.hidden_size}, or remove it."
        )
    faults += _groups(moe) or _router_choice(moe)
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
            f"be of equal size. Use {choice(divisors(moe.num_experts))}."
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


def _router_choice(moe: MoEConfig) -> list[str]:
    """What steers a token's choice has no effect where tokens do not choose."""
    chosen, faults = moe.router_choice, []
    if chosen == "token":
        return []
    if moe.num_expert_groups is not None:
        faults.append(
            f"model.moe.num_expert_groups is {moe.num_expert_groups}, but model.moe.router_choice is {chosen}: groups "
            f"limit what a token chooses, and here tokens do not choose, so they have no effect. "
            f"Remove num_expert_groups and top_k_groups, or use router_choice token."
        )
    if moe.selection_bias:
        faults.append(
            f"model.moe.selection_bias is true, but model.moe.router_choice is {chosen}: a bias steers the choice of "
            f"tokens, and here they do not choose, so it has no effect. Set model.moe.selection_bias=false and "
            f"balance.bias_update_rate=0, or use router_choice token."
        )
    if chosen == "expert" and moe.normalize_top_k:
        faults.append(
            "model.moe.normalize_top_k is true, but model.moe.router_choice is expert: a token that only one expert "
            "takes would always weigh 1, and the router would learn nothing from it. Set "
            "model.moe.normalize_top_k=false."
        )
    return faults
