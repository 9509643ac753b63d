"""A model's shape -> parameters and FLOPs, by arithmetic alone."""

from dataclasses import dataclass

from moe.config import ModelConfig
from moe.config.model import Precision


@dataclass(frozen=True)
class Count:
    """Sizes of a model at a sequence length."""

    total_parameters: int
    active_parameters: int
    """Parameters that one token's forward pass uses."""
    flops_per_token: int
    """Forward and backward: 6 per active matmul parameter (head included, embedding not), and attention with
    its causal half counted once."""

    def sentence(self) -> str:
        """For the log."""
        return (
            f"{_short(self.total_parameters)} parameters, {_short(self.active_parameters)} active per token, "
            f"{self.flops_per_token / 1e9:.3g} GFLOP per token"
        )


def count(config: ModelConfig, sequence_length: int) -> Count:
    """Count a model without building it."""
    hidden, heads = config.hidden_size, config.attention.num_heads
    query, kv = heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = hidden * query * 2 + hidden * kv * 2
    extras = 2 * hidden + (2 * config.head_dim if config.attention.qk_norm else 0)
    extras += query + 2 * kv if config.attention.qkv_bias else 0
    sparse = len(config.sparse_layers)
    dense = config.num_layers - sparse
    total_biases = active_biases = 0
    total = config.num_layers * attention + dense * 3 * hidden * (config.intermediate_size or 0)
    active = total
    if config.moe is not None:
        moe = config.moe
        width = moe.latent_size or hidden
        expert = 3 * width * moe.expert_intermediate_size
        always = hidden * moe.num_experts + 3 * hidden * (moe.shared_expert_intermediate_size or 0)
        always += (hidden if moe.shared_expert_gate else 0) + 2 * hidden * (moe.latent_size or 0)
        bias = 2 * moe.expert_intermediate_size + width if moe.expert_bias else 0
        total += sparse * (always + moe.num_experts * expert)
        active += sparse * (always + moe.top_k * expert)
        total_biases, active_biases = sparse * moe.num_experts * bias, sparse * moe.top_k * bias
    head = config.vocab_size * hidden
    small = config.num_layers * extras + hidden
    embedding = 0 if config.tie_embeddings else head
    causal_attention = 6 * query * sequence_length * config.num_layers
    return Count(
        total_parameters=total + total_biases + head + embedding + small,
        active_parameters=active + active_biases + head + embedding + small,
        flops_per_token=6 * (active + head) + causal_attention,
    )


def kept_by_experts(config: ModelConfig, precision: Precision, recompute: str) -> int:
    """Bytes of activations that routed experts keep for backward, per token of a micro-batch, over all layers.

    The pre-activations of gate and up, 2 F for each of K choices; nothing when they are recomputed, by experts
    or with their whole block. Tokens are read where they are, and outputs are not kept at all.
    """
    if config.moe is None or recompute != "none":
        return 0
    size = {"fp32": 4, "bf16": 2}[precision]
    return len(config.sparse_layers) * config.moe.top_k * 2 * config.moe.expert_intermediate_size * size


def _short(number: int) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
