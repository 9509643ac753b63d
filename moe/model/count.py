"""A model's shape -> parameters and FLOPs, by arithmetic alone."""

from dataclasses import dataclass

from moe.config import ModelConfig, RunConfig
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
    hidden, blocks = config.hidden_size, config.num_blocks
    attention, vectors = _attention(config)
    small = 0
    norms = 2 * (1 + (config.norm_placement == "sandwich")) * _norm(config)
    sparse = len(config.sparse_layers)
    total = blocks * attention + (blocks - sparse) * 3 * hidden * (config.intermediate_size or 0)
    total += config.prediction_depth * 2 * hidden * hidden
    active = total
    total_biases = active_biases = 0
    if config.moe is not None:
        moe = config.moe
        width = moe.latent_size or hidden
        expert = 3 * width * moe.expert_intermediate_size
        always = hidden * moe.num_experts + 3 * hidden * (moe.shared_expert_intermediate_size or 0)
        always += (hidden if moe.shared_expert_gate else 0) + 2 * hidden * (moe.latent_size or 0)
        small += sparse * (moe.num_experts if moe.router_bias else 0)
        bias = 2 * moe.expert_intermediate_size + width if moe.expert_bias else 0
        total += sparse * (always + moe.num_experts * expert)
        active += sparse * (always + moe.top_k * expert)
        total_biases, active_biases = sparse * moe.num_experts * bias, sparse * moe.top_k * bias
    head = config.vocab_size * hidden
    small += blocks * (vectors + norms) + (1 + 3 * config.prediction_depth) * _norm(config)
    small += config.vocab_size if config.head_bias else 0
    embedding = 0 if config.tie_embeddings else head
    return Count(
        total_parameters=total + total_biases + head + embedding + small,
        active_parameters=active + active_biases + head + embedding + small,
        flops_per_token=6 * (active + head * (1 + config.prediction_depth))
        + _mixing(config, sequence_length),
    )


def _attention(config: ModelConfig) -> tuple[int, int]:
    """Elements of the matrices of a layer's attention, and of its vectors."""
    attention, latent, hidden = config.attention, config.attention.latent, config.hidden_size
    heads = attention.num_heads
    query, output = heads * config.head_dim, heads * config.value_head_dim
    vectors = (hidden if attention.output_bias else 0) + (heads if attention.sinks else 0)
    matrices = output * hidden * (2 if attention.output_gate else 1)
    if latent is None:
        kv = config.num_kv_heads * config.head_dim
        vectors += query + 2 * kv if attention.qkv_bias else 0
        norm = {"none": 0, "full": query + kv}.get(attention.qk_norm, 2 * config.head_dim)
        return matrices + hidden * (query + 2 * kv), vectors + norm
    down = latent.kv_rank + latent.rope_head_dim
    matrices += hidden * down + latent.kv_rank * heads * (latent.nope_head_dim + latent.value_head_dim)
    vectors += latent.kv_rank
    if latent.query_rank is None:
        matrices += hidden * query
    else:
        matrices += latent.query_rank * (hidden + query)
        vectors += latent.query_rank
        down += latent.query_rank
    return matrices, vectors + (down if attention.qkv_bias else 0)


def _norm(config: ModelConfig) -> int:
    return config.hidden_size * (2 if config.norm == "layer" else 1)


def _mixing(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of attention itself, forward and backward: of what a query could see, half is in the future."""
    width = config.attention.num_heads * (config.head_dim + config.value_head_dim)
    seen = 0.0
    for layer in range(config.num_blocks):
        window = config.attention.window(layer)
        reach = sequence_length if window is None else min(window, sequence_length)
        seen += reach - reach * reach / (2 * sequence_length)
    return round(6 * width * seen)


def kept_by_experts(
    config: ModelConfig, precision: Precision, recompute: str, expert_parallel_size: int = 1
) -> int:
    """Bytes of activations that routed experts keep for backward, per token of a micro-batch, over all layers.

    The pre-activations of gate and up, 2 F for each of K choices, unless experts compute them again. What experts read
    is kept too where it is nobody else's: the token in its latent width, or, with expert parallelism, a copy for each
    rank that it visits, K at most; a rank whose experts are in demand has more than the mean. Nothing where whole
    blocks are computed again. Outputs are not kept by experts at all. Rows that fill up an expert's share (see
    `moe.sparse.padded`: one in 32, or 7, at most) are not in it.
    """
    moe = config.moe
    if moe is None or recompute == "block":
        return 0
    numbers = moe.top_k * 2 * moe.expert_intermediate_size if recompute == "none" else 0
    if expert_parallel_size > 1:
        numbers += min(moe.top_k, expert_parallel_size) * (moe.latent_size or config.hidden_size)
    elif moe.latent_size is not None:
        numbers += moe.latent_size
    return len(config.sparse_layers) * numbers * {"fp32": 4, "bf16": 2}[precision]


def kept_sentence(run: RunConfig) -> str:
    """What a run's experts keep, in words; empty if it has none, or adapts them: autograd keeps more for those."""
    if run.model.moe is None or (run.lora is not None and "experts" in run.lora.targets):
        return ""
    train, parallel = run.train, run.parallel
    ep = parallel.expert_parallel_size
    kept = kept_by_experts(run.model, train.precision, train.activation_recomputation, ep)
    tokens = train.micro_batch_size * run.data.sequence_length / parallel.sequence_parallel_size
    most = " at most, the mean over ranks" if ep > 1 else ""
    return (
        f"routed experts keep {kept} bytes of activations per token for backward{most}, "
        f"{kept * tokens / 1e9:.3g} GB a micro-batch"
    )


def _short(number: int) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
