"""The shape of a decoder-only Transformer, dense or sparse."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from moe.config.attention import AttentionConfig, Layers
from moe.config.base import Count, Section, Size


class MoEConfig(Section):
    num_experts: Annotated[int, Field(gt=0, le=65_536)]
    """Routed experts in a sparse layer."""
    top_k: Size
    """Experts that each token visits."""
    expert_intermediate_size: Size
    """Width of one expert's SwiGLU."""
    expert_activation: Literal["swiglu", "gpt_oss"] = "swiglu"
    """silu(gate) up (arXiv:2002.05202), or gate sigmoid(1.702 gate) (up + 1) (GPT-OSS, arXiv:2508.10925)."""
    activation_alpha: PositiveFloat = 1.702
    """That factor on the gate; gpt_oss only."""
    activation_limit: PositiveFloat | None = None
    """Cap of gate and of |up| before they are multiplied (GPT-OSS: 7); null: none."""
    expert_bias: bool = False
    """Biases on both projections of every expert (GPT-OSS)."""
    latent_size: Size | None = None
    """Width in which routed experts work, between projections to it and back (arXiv:2601.18089); null: hidden_size."""
    router_score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    """How logits become scores: over all experts (arXiv:1701.06538), each on its own (arXiv:2412.19437), or for each of
    two choices over those within sparsemixer_margin of the best that is left (arXiv:2409.12136, as it is used, without
    the noise that it samples with in training)."""
    sparsemixer_margin: PositiveFloat | None = None
    """Relative distance from the best logit, halved, beyond which an expert has no part; sparsemixer only."""
    router_bias: bool = False
    """A bias on the router's logits (GPT-OSS)."""
    router_choice: Literal["token", "expert", "round_robin"] = "token"
    """Who chooses. token: each token its top_k best experts. expert: each expert its best tokens of the micro-batch,
    top_k a token on average (arXiv:2202.09368); later tokens then bear on earlier ones, so that causal training sees
    a little of the future and the model cannot generate. round_robin: nobody; loads are equal whatever the weights,
    for benchmarks, and no routing is learned."""
    normalize_top_k: bool = True
    """Divide the chosen scores by their sum; with softmax this is the softmax over the chosen logits alone (Mixtral,
    GPT-OSS). With false and a top_k of 1: Switch (arXiv:2101.03961)."""
    route_scale: PositiveFloat = 1.0
    """Factor on the routing weights (DeepSeek-V3: 2.5)."""
    num_expert_groups: Size | None = None
    """Blocks of experts of which a token may visit only top_k_groups (arXiv:2405.04434, section 2.2.2)."""
    top_k_groups: Size | None = None
    """Groups that a token may visit."""
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    """A group's score: its best expert (DeepSeek-V2), or the sum of its two best (DeepSeek-V3)."""
    selection_bias: bool = False
    """A bias per expert that steers the choice and never the weights (arXiv:2408.15664)."""
    first_k_dense: Count = 0
    """Layers at the bottom that keep a dense feed-forward block (DeepSeek-V2, arXiv:2405.04434)."""
    dense_layers: Layers = ()
    """Further layers that keep one."""
    shared_expert_intermediate_size: Size | None = None
    """Width of an expert that every token visits (arXiv:2401.06066); null: none."""
    shared_expert_gate: bool = False
    """Scale the shared expert's output by a learned sigmoid (Qwen2-MoE)."""


class ModelConfig(Section):
    vocab_size: Size
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    hidden_size: Size
    """Width of the residual stream."""
    num_layers: Annotated[int, Field(gt=0, le=10_000)]
    """Decoder layers."""
    intermediate_size: Size | None = None
    """Width of the SwiGLU in dense layers; needed when there are any."""
    max_sequence_length: Size = 2048
    """Positions the exported model declares; training sequences may not be longer."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (arXiv:1910.07467), or LayerNorm with a bias (arXiv:1607.06450); norms inside attention are RMSNorm."""
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    """Norms before attention and feed-forward, after them and before the residual (OLMo 2), or both (AFMoE)."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of every norm but those of latents."""
    tie_embeddings: bool = False
    """Use the embedding as the output projection."""
    head_bias: bool = False
    """A bias on the output projection."""
    embedding_multiplier: PositiveFloat = 1.0
    """Factor on embeddings (Granite)."""
    residual_multiplier: PositiveFloat = 1.0
    """Factor on what a block adds to the residual stream (Granite)."""
    logit_divisor: PositiveFloat = 1.0
    """What logits are divided by (Granite)."""
    prediction_depth: Annotated[int, Field(ge=0, le=64)] = 0
    """Modules at the end that predict further tokens, one more each, in training only (arXiv:2412.19437, section
    2.2)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; output projections get init_std / sqrt(2 num_layers)."""
    architecture: str | None = None
    """Stock architecture (model_type) to export as; null: the first of the table that equals the model."""
    attention: AttentionConfig
    moe: MoEConfig | None = None
    """The sparse layers; null: a dense model."""

    @property
    def head_dim(self) -> int:
        """Width of a query head and of a key head."""
        if (latent := self.attention.latent) is not None:
            return latent.nope_head_dim + latent.rope_head_dim
        return self.attention.head_dim or self.hidden_size // self.attention.num_heads

    @property
    def value_head_dim(self) -> int:
        latent = self.attention.latent
        return self.head_dim if latent is None else latent.value_head_dim

    @property
    def rotary_dim(self) -> int:
        """Width of the part of a head that is rotated."""
        latent = self.attention.latent
        width = self.head_dim if latent is None else latent.rope_head_dim
        return int(width * self.attention.rope_fraction)

    @property
    def num_kv_heads(self) -> int:
        return self.attention.num_kv_heads or self.attention.num_heads

    @property
    def num_blocks(self) -> int:
        """Decoder layers, those of prediction modules included, which come last."""
        return self.num_layers + self.prediction_depth

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices of the blocks with routed experts."""
        if self.moe is None:
            return ()
        dense = self.moe.dense_layers
        return tuple(n for n in range(self.moe.first_k_dense, self.num_blocks) if n not in dense)


Precision = Literal["fp32", "bf16"]
Fraction = Field(ge=0.0, le=1.0)
