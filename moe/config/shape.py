"""What the settings of a model must agree on."""

from moe.config.heads import attention_faults
from moe.config.model import ModelConfig, MoEConfig
from moe.config.numbers import choice, divisors


def shape_faults(model: ModelConfig) -> list[str]:
    """Every contradiction inside the model, a line each."""
    return [*attention_faults(model), *_layers(model), *_experts(model)]


def _layers(model: ModelConfig) -> list[str]:
    dense, faults = model.num_blocks - len(model.sparse_layers), _named_layers(model)
    if faults:
        return faults
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


def _named_layers(model: ModelConfig) -> list[str]:
    """Lists of layers: each is there, and once."""
    faults = []
    if model.tie_embeddings and model.head_bias:
        faults.append(
            "model.head_bias is true, but model.tie_embeddings is true: an embedding has no bias to tie. Set one of "
            "them to false."
        )
    for path, layers in (
        ("attention.window_layers", model.attention.window_layers or ()),
        ("moe.dense_layers", model.moe.dense_layers if model.moe else ()),
    ):
        wrong = [n for n in layers if n >= model.num_layers or layers.count(n) > 1]
        if wrong:
            faults.append(
                f"model.{path} has {wrong[0]}: a layer is a number from 0 to {model.num_layers - 1}, and is named "
                f"once. Remove it."
            )
    if model.moe is not None and (low := [n for n in model.moe.dense_layers if n < model.moe.first_k_dense]):
        faults.append(
            f"model.moe.dense_layers has {low[0]}, but model.moe.first_k_dense is {model.moe.first_k_dense}: that "
            f"layer is dense already. Remove it."
        )
    return faults


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
    elif len(model.sparse_layers) == model.prediction_depth:
        faults.append(
            f"model.moe.dense_layers names all {model.num_layers} layers: none would be sparse. Name fewer, or remove "
            f"model.moe."
        )
    if moe.latent_size is not None and moe.latent_size >= model.hidden_size:
        faults.append(
            f"model.moe.latent_size is {moe.latent_size}, but model.hidden_size is {model.hidden_size}: the latent "
            f"width saves work only where it is smaller. Use less than {model.hidden_size}, or remove it."
        )
    faults += _groups(moe) or _router_choice(moe)
    faults += _forms(moe)
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


def _forms(moe: MoEConfig) -> list[str]:
    """What belongs to one form of activation or score has no effect with another."""
    faults = []
    if (
        moe.expert_activation == "swiglu"
        and moe.activation_alpha != MoEConfig.model_fields["activation_alpha"].default
    ):
        faults.append(
            f"model.moe.activation_alpha is {moe.activation_alpha}, but model.moe.expert_activation is swiglu, which "
            f"has none, so it has no effect. Remove it, or use expert_activation gpt_oss."
        )
    mixer = moe.router_score == "sparsemixer"
    if mixer != (moe.sparsemixer_margin is not None):
        faults.append(
            f"model.moe.router_score is {moe.router_score} and model.moe.sparsemixer_margin is "
            f"{moe.sparsemixer_margin}: they belong together. Set both, or remove sparsemixer_margin."
        )
    if mixer and (
        moe.router_choice != "token" or not moe.normalize_top_k or moe.selection_bias or moe.num_expert_groups
    ):
        faults.append(
            f"model.moe.router_score is sparsemixer, router_choice is {moe.router_choice}, normalize_top_k is "
            f"{moe.normalize_top_k}, selection_bias is {moe.selection_bias}, num_expert_groups is "
            f"{moe.num_expert_groups}: sparsemixer takes the best experts in turn and normalises each among those "
            f"left, whatever else steers a choice. Use router_choice token, normalize_top_k true, and neither "
            f"selection_bias nor num_expert_groups."
        )
    return faults
