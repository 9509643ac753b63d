"""How tokens mix: heads, rotation, windows, latents."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat

from moe.config.base import Count, Section, Size


def _norm(value: Any) -> Any:
    """True and false are short for the commonest two."""
    return {True: "head", False: "none"}[value] if isinstance(value, bool) else value


QueryKeyNorm = Annotated[Literal["none", "head", "full", "after_rotation"], BeforeValidator(_norm)]
Factors = Annotated[tuple[PositiveFloat, ...], Field(strict=False)]
Layers = Annotated[tuple[Count, ...], Field(strict=False)]


class RopeScaling(Section):
    """Frequencies stretched for sequences longer than those first trained on."""

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    """Divide all frequencies (arXiv:2306.15595), the low ones (Llama 3.1), by a ramp (arXiv:2309.00071), or each by a
    number of its own (arXiv:2402.13753)."""
    factor: PositiveFloat
    """How many times longer."""
    original_max_sequence_length: Size | None = None
    """Positions of the first training; all but linear."""
    low_frequency_factor: PositiveFloat | None = None
    """Waves longer than the original length over this are divided; llama3."""
    high_frequency_factor: PositiveFloat | None = None
    """Waves shorter than the original length over this stay; llama3."""
    beta_fast: PositiveFloat | None = None
    """Rotations within the original length from which a frequency stays; yarn (32 if not given)."""
    beta_slow: PositiveFloat | None = None
    """Rotations below which a frequency is divided; yarn (1 if not given)."""
    truncate: bool = True
    """Round the ends of the ramp to whole pairs; yarn."""
    attention_factor: PositiveFloat | None = None
    """Factor on cosine and sine; yarn. Null: from factor, as section 3.4 of the paper has it."""
    mscale: PositiveFloat | None = None
    """Weight of log(factor) in that factor, above mscale_all_dim's (DeepSeek-V2); yarn."""
    mscale_all_dim: PositiveFloat | None = None
    """Its weight for all dimensions of a head; scales latent attention's logits too (DeepSeek-V2); yarn."""
    short_factors: Factors | None = None
    """What each frequency is divided by up to the original length; longrope."""
    long_factors: Factors | None = None
    """What each frequency is divided by beyond it; longrope."""
    short_mscale: PositiveFloat | None = None
    """Factor on cosine and sine up to the original length; longrope (Phi-3.5-MoE)."""
    long_mscale: PositiveFloat | None = None
    """Factor on cosine and sine beyond it; longrope."""


class LatentAttentionConfig(Section):
    """Keys and values from one small latent, queries perhaps from another (MLA, arXiv:2405.04434, section 2.1)."""

    kv_rank: Size
    """Width of the latent of keys and values."""
    query_rank: Size | None = None
    """Width of the latent of queries; null: queries straight from the input."""
    nope_head_dim: Size
    """Width of a query's and key's part without rotation."""
    rope_head_dim: Size
    """Width of their rotated part; all heads share the key's."""
    value_head_dim: Size
    """Width of a value head."""


class AttentionConfig(Section):
    num_heads: Size
    """Query heads."""
    num_kv_heads: Size | None = None
    """Key and value heads, each shared by num_heads / num_kv_heads query heads; null: num_heads."""
    head_dim: Size | None = None
    """Width of a head; null: hidden_size / num_heads."""
    latent: LatentAttentionConfig | None = None
    """Latent attention, with widths of its own; null: keys and values straight from the input."""
    qk_norm: QueryKeyNorm = "head"
    """RMSNorm of queries and keys before the rotation, over each head (Qwen3) or all of them (OLMoE), or over each head
    after it (Hunyuan); true: head, false: none."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2); in latent attention, on those to the latents."""
    output_bias: bool = False
    """A bias on the output projection."""
    clip_qkv: PositiveFloat | None = None
    """Largest absolute value of queries, keys and values as they are projected (OLMoE); null: none."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies (arXiv:2104.09864)."""
    rope_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of a head's width that is rotated, the first part (GLM-4.5: 0.5)."""
    rope_scaling: RopeScaling | None = None
    """Longer sequences than those first trained on; null: plain frequencies."""
    rope_layers: Literal["all", "windowed"] = "all"
    """Layers that rotate: all, or those with a window only (EXAONE, AFMoE; arXiv:2305.19466)."""
    sliding_window: Size | None = None
    """Positions that a query sees, its own included (arXiv:2310.06825); null: all before it."""
    window_layers: Layers | None = None
    """Layers that have the window; null: all."""
    sinks: bool = False
    """A learned logit per head that takes part in the softmax and adds nothing (GPT-OSS, arXiv:2309.17453)."""
    output_gate: bool = False
    """Multiply what heads give by a sigmoid of a projection of the input (AFMoE)."""
    scale: PositiveFloat | None = None
    """Factor on the logits of attention (Granite); null: one over the root of the width of a query head."""

    def window(self, layer: int) -> int | None:
        """Positions that a query of `layer` sees; None: all before it."""
        has = self.window_layers is None or layer in self.window_layers
        return self.sliding_window if has else None

    def rotates(self, layer: int) -> bool:
        """Whether `layer` rotates queries and keys."""
        return self.rope_layers == "all" or self.window(layer) is not None
