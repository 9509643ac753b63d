"""A recipe -> a small recipe with the same switches, that a CPU trains in moments."""

import math
from typing import Any

from moe.config import ModelConfig, MoEConfig, RunConfig
from moe.config.shape import shape_faults

STEPS = 5
"""Optimizer steps that are compared."""
WIDTH, LENGTH, VOCABULARY, DENSE, EXPERT, SHARED, LATENT = 32, 32, 128, 40, 24, 20, 16
WINDOW = 10
EXPERTS, GROUPS, CHOICES, LAYERS, SEQUENCES = 8, 4, 3, 2, 8


def shrink(run: RunConfig, world_size: int) -> RunConfig:
    """`run` with small sizes, for any layout of up to `world_size` ranks that its experts allow.

    Every switch stays as it is; numbers that act only at some size are scaled with it: the initial weights, so that
    activations keep their size; the clip, the experts' cap and their capacity, so that they act.
    """
    page = run.model_dump()
    page["model"] = _model(run.model, world_size)
    page["data"]["sequence_length"] = min(run.data.sequence_length, LENGTH)
    page["train"] = _train(run, world_size)
    page["balance"] |= _capacity(run, page["model"])
    page["checkpoint"] = {}
    page["logging"] = {}
    page["parallel"] = {}
    return RunConfig.model_validate(page)


def _model(model: ModelConfig, world_size: int) -> dict[str, Any]:
    page = model.model_dump()
    page["num_layers"] = layers = _num_layers(model)
    page["prediction_depth"] = min(model.prediction_depth, 1)
    page["vocab_size"] = min(model.vocab_size, VOCABULARY)
    page["hidden_size"] = WIDTH
    page["max_sequence_length"] = min(model.max_sequence_length, LENGTH)
    # A sum over D inputs grows with sqrt(D).
    page["init_std"] = min(model.init_std * math.sqrt(max(1.0, model.hidden_size / WIDTH)), 0.2)
    if model.intermediate_size is not None:
        page["intermediate_size"] = DENSE
    page["attention"] |= _attention(model, layers)
    if model.moe is not None:
        page["moe"] |= _experts(page, model.moe, world_size)
    return page


def _num_layers(model: ModelConfig) -> int:
    sparse = len(model.sparse_layers) - (model.prediction_depth if model.moe else 0)
    dense = model.num_layers - sparse
    return min(dense, LAYERS if model.moe is None else 1) + min(sparse, LAYERS)


def _attention(model: ModelConfig, layers: int) -> dict[str, Any]:
    """As many query heads to a key head as there were, as near as four heads allow; windows and latents scaled too."""
    attention = model.attention
    heads = 2 ** min(2, attention.num_heads.bit_length() - 1)
    kv_heads = attention.num_kv_heads
    if kv_heads is not None:
        kv_heads = {1: 1, attention.num_heads: heads}.get(kv_heads, 2)
    head_dim = attention.head_dim
    if head_dim is not None:
        even = head_dim * attention.num_heads == model.hidden_size
        head_dim = WIDTH // heads if even else WIDTH // heads + 4
    page: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    width = head_dim or WIDTH // heads
    if attention.latent is not None:
        latent = attention.latent
        rank = None if latent.query_rank is None else LATENT
        page["latent"] = latent.model_dump() | {
            "kv_rank": LATENT,
            "query_rank": rank,
            "nope_head_dim": 8,
            "rope_head_dim": 8,
            "value_head_dim": 12,
        }
        width = 8
    if attention.rope_fraction < 1:
        page["rope_fraction"] = (2 * math.ceil(width / 4)) / width  # half of it, an even number
        if page["rope_fraction"] >= 1:
            page["rope_fraction"] = 2 / width
    if (scaling := attention.rope_scaling) is not None and scaling.kind == "longrope":
        pairs = int(width * page.get("rope_fraction", 1.0)) // 2
        factors = {key: getattr(scaling, key) for key in ("short_factors", "long_factors")}
        few = {key: [many[n % len(many)] for n in range(pairs)] for key, many in factors.items()}
        page["rope_scaling"] = scaling.model_dump() | few
    if attention.sliding_window is not None:
        page["sliding_window"] = WINDOW
    if attention.window_layers is not None:
        # Some of few, as some of many.
        page["window_layers"] = tuple(range(0, layers, 2))
    return page


def _experts(page: dict[str, Any], moe: MoEConfig, world_size: int) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "expert_intermediate_size": min(moe.expert_intermediate_size, EXPERT),
        "first_k_dense": min(moe.first_k_dense, 1),
        "dense_layers": (0,) if moe.dense_layers and not moe.first_k_dense else (),
        "top_k": min(moe.top_k, CHOICES),
    }
    if moe.shared_expert_intermediate_size is not None:
        sizes["shared_expert_intermediate_size"] = min(moe.shared_expert_intermediate_size, SHARED)
    if moe.latent_size is not None:
        sizes["latent_size"] = LATENT
    if moe.activation_limit is not None:
        sizes["activation_limit"] = min(moe.activation_limit, 0.5)
    for shape in _expert_counts(moe, world_size):
        small = ModelConfig.model_validate({**page, "moe": {**moe.model_dump(), **sizes, **shape}})
        if not shape_faults(small):
            return {**sizes, **shape}
    return sizes


def _capacity(run: RunConfig, small: dict[str, Any]) -> dict[str, float]:
    """As far below the greatest load that there can be as it was, if it would be above."""
    moe, factor = run.model.moe, run.balance.capacity_factor
    if moe is None or factor is None:
        return {}
    most, was = small["moe"]["num_experts"] / small["moe"]["top_k"], moe.num_experts / moe.top_k
    return {} if factor < most else {"capacity_factor": factor * most / was}


def _expert_counts(moe: MoEConfig, world_size: int) -> list[dict[str, int]]:
    """Numbers of experts and of groups, few first, that can be spread as the recipe's can."""
    unit = math.gcd(moe.num_experts, world_size)
    counts = [n for n in range(unit, moe.num_experts, unit) if n >= min(EXPERTS, moe.num_experts)][:64]
    if moe.num_expert_groups is None or moe.top_k_groups is None:
        return [{"num_experts": n} for n in [*counts, moe.num_experts]]
    groups = min(moe.num_expert_groups, GROUPS)
    # All groups, or one, or some: what it was before.
    chosen = moe.top_k_groups if moe.top_k_groups <= 1 else min(moe.top_k_groups, groups - 1)
    if moe.top_k_groups == moe.num_expert_groups:
        chosen = groups
    few = [{"num_experts": n, "num_expert_groups": groups, "top_k_groups": max(chosen, 1)} for n in counts]
    same = {"num_expert_groups": moe.num_expert_groups, "top_k_groups": moe.top_k_groups}
    return [*few, {"num_experts": moe.num_experts, **same}]


def _train(run: RunConfig, world_size: int) -> dict[str, Any]:
    page: dict[str, Any] = run.train.model_dump()
    each = 2 * world_size  # every rank gets two sequences at least, to accumulate
    page["global_batch_size"] = page["micro_batch_size"] = each * math.ceil(SEQUENCES / each)
    page["steps"] = STEPS
    page["evaluate_every"] = None
    page["activation_recomputation"] = "none"
    # A skip is one rank's decision for all; a step that is a spike is skipped after more steps than these.
    page["guard"] = {"non_finite": run.train.guard.non_finite}
    page["schedule"]["warmup_steps"] = min(run.train.schedule.warmup_steps, 2)
    if run.train.schedule.decay_steps is not None:
        page["schedule"]["decay_steps"] = min(run.train.schedule.decay_steps, 2)
    page["optimizer"]["gradient_clipping"] = min(run.train.optimizer.gradient_clipping, 0.1)
    return page
