"""What the settings of attention must agree on."""

from collections.abc import Iterable

from moe.config.attention import AttentionConfig, RopeScaling
from moe.config.model import ModelConfig
from moe.config.numbers import choice, divisors

_OF_KIND = {
    "llama3": {"original_max_sequence_length", "low_frequency_factor", "high_frequency_factor"},
    "yarn": {"original_max_sequence_length"},
    "linear": set(),
    "longrope": {
        *("original_max_sequence_length", "short_factors", "long_factors", "short_mscale", "long_mscale"),
    },
}
"""What a kind of scaling needs."""
_MAY = {"yarn": {"beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"}}
"""What it may have besides."""


def attention_faults(model: ModelConfig) -> list[str]:
    """Every contradiction, a line each."""
    attention = model.attention
    widths = _latent(attention) if attention.latent is not None else _heads(model)
    faults = (
        widths
        + _windows(attention)
        + list(_scaling(attention.rope_scaling, model.rotary_dim // 2, attention.latent is not None))
    )
    width = model.head_dim if attention.latent is None else attention.latent.rope_head_dim
    if not faults and (model.rotary_dim % 2 or not model.rotary_dim):
        whole = attention.rope_fraction == 1
        path = "head_dim" if attention.latent is None else "latent.rope_head_dim"
        faults.append(
            f"model.attention.{path} is {width}: rotary embedding turns pairs, so it must be even. "
            f"Use {width + 1}, or another width."
            if whole
            else f"model.attention.rope_fraction is {attention.rope_fraction}, which makes {model.rotary_dim} of "
            f"{width} columns: rotary embedding turns pairs, so it must be an even number above 0. Use a fraction that "
            f"gives one, for example {2 * max(1, model.rotary_dim // 2) / width:.4g}."
        )
    return faults


def _heads(model: ModelConfig) -> list[str]:
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
    return faults


def _latent(attention: AttentionConfig) -> list[str]:
    """Latent attention has widths of its own; what speaks of others has no effect."""
    idle = {
        "num_kv_heads": attention.num_kv_heads is not None,
        "head_dim": attention.head_dim is not None,
        "qk_norm": attention.qk_norm != "none",
        "clip_qkv": attention.clip_qkv is not None,
    }
    way_out = {"qk_norm": "Set model.attention.qk_norm=none"}
    return [
        f"model.attention.{name} is {getattr(attention, name)}, but model.attention.latent is set: latent attention "
        f"has no such thing, so it has no effect. {way_out.get(name, 'Remove it')}, or remove latent."
        for name, found in idle.items()
        if found
    ]


def _windows(attention: AttentionConfig) -> list[str]:
    faults = []
    if attention.sliding_window is None and attention.window_layers is not None:
        faults.append(
            f"model.attention.window_layers is {list(attention.window_layers)}, but there is no sliding_window, so it "
            f"has no effect. Remove it, or set model.attention.sliding_window."
        )
    if attention.window_layers == ():
        faults.append(
            "model.attention.window_layers is empty, so the window has no effect. Remove it and sliding_window."
        )
    if attention.rope_layers == "windowed" and attention.sliding_window is None:
        faults.append(
            "model.attention.rope_layers is windowed, but there is no sliding_window: no layer would know positions. "
            "Use rope_layers all, or set model.attention.sliding_window."
        )
    return faults


def _scaling(scaling: RopeScaling | None, pairs: int, latent: bool) -> Iterable[str]:
    if scaling is None:
        return
    here, needed = "model.attention.rope_scaling", _OF_KIND[scaling.kind]
    fields = RopeScaling.model_fields.items()
    given = {name for name, field in fields if getattr(scaling, name) != field.default} - {"kind", "factor"}
    if missing := sorted(needed - given):
        yield f"{here} is {scaling.kind}, which needs {missing[0]}, but it is not set. Set it."
    if idle := sorted(given - needed - _MAY.get(scaling.kind, set())):
        yield f"{here}.{idle[0]} has no effect on {scaling.kind}. Remove it."
    for name in ("short_factors", "long_factors"):
        factors = getattr(scaling, name)
        if scaling.kind == "longrope" and factors is not None and len(factors) != pairs:
            yield (
                f"{here}.{name} has {len(factors)} numbers, but {pairs} pairs of a head's columns are rotated: each "
                f"frequency has one. Give {pairs}."
            )
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    if low is not None and high is not None and low >= high:
        yield f"{here}.low_frequency_factor is {low}, but high_frequency_factor is {high}: it must be lower."
    if scaling.attention_factor is not None and scaling.mscale is not None:
        yield f"{here}.mscale has no effect beside attention_factor. Remove one of them."
    if scaling.mscale is not None and scaling.mscale_all_dim is None:
        yield f"{here}.mscale has no effect without mscale_all_dim. Set it, or remove mscale."
    if scaling.mscale_all_dim is not None and scaling.mscale is None and not latent:
        yield f"{here}.mscale_all_dim has no effect without mscale, but in latent attention. Remove it, or set mscale."
