"""Names of our tensors and of theirs, in the groups in which stock architectures share them.

Nothing is transposed but in GPT-OSS. Rotary pairs that stand side by side on disk stand half a head apart here.
"""

from collections.abc import Callable, Mapping
from itertools import chain

from moe.config import ModelConfig
from moe.hf.family import SET, Layers, Name

LAYER = "model.layers.{layer}."
OURS = "layers.{layer}."


def linear(ours: str, disk: str, shape: str, layers: Layers = "all", **more: object) -> Name:
    """A weight in every layer of a kind; `shape` in letters, `more` as in `Name`."""
    return Name(f"{OURS}{ours}.weight", (f"{LAYER}{disk}.weight",), tuple(shape.split()), layers, **more)  # type: ignore[arg-type]  # fields of Name


def bias(ours: str, disk: str, shape: str, switch: str, layers: Layers = "all", **more: object) -> Name:
    """A bias that is there when the switch is on."""
    when = {switch: True, **more.pop("when", {})}  # type: ignore[dict-item]  # a mapping, as in Name
    return Name(f"{OURS}{ours}.bias", (f"{LAYER}{disk}.bias",), (shape,), layers, when, **more)  # type: ignore[arg-type]


def swiglu(ours: str, disk: str, width: str, layers: Layers, **more: object) -> tuple[Name, ...]:
    """Three matrices by the usual names."""
    return (
        linear(f"{ours}.gate", f"{disk}.gate_proj", f"{width} D", layers, **more),
        linear(f"{ours}.up", f"{disk}.up_proj", f"{width} D", layers, **more),
        linear(f"{ours}.down", f"{disk}.down_proj", f"D {width}", layers, **more),
    )


def experts(
    block: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj", router: str = "gate"
) -> tuple[Name, ...]:
    """A router and one set of tensors for each expert."""
    each = f"{LAYER}{block}.experts.{{expert}}."
    ours = f"{OURS}ffn.experts."
    return (
        linear("ffn.router", f"{block}.{router}", "E D", "sparse"),
        Name(ours + "gate_up", (f"{each}{gate}.weight", f"{each}{up}.weight"), ("E", "2F", "D"), "sparse"),
        Name(ours + "down", (f"{each}{down}.weight",), ("E", "D", "F"), "sparse"),
    )


def selection_bias(disk: str, disk_shape: tuple[str, ...] | None = None) -> Name:
    """What steers the choice of experts, float32 everywhere."""
    return Name(
        f"{OURS}ffn.router.selection_bias_E",
        (LAYER + disk,),
        ("E",),
        "sparse",
        {"moe.selection_bias": True},
        disk_shape=disk_shape,
        wide=True,
    )


def shared(disk: str, gate: str | None = None) -> tuple[Name, ...]:
    """The expert that all tokens visit, if there is one, and its gate."""
    there = {"moe.shared_expert_intermediate_size": SET}
    found = swiglu("ffn.shared_expert", disk, "S", "sparse", when=there)
    return found if gate is None else (*found, linear("ffn.shared_expert_gate", gate, "1 D", "sparse"))


def attention(order: Callable[[ModelConfig], list[int]] | None = None) -> tuple[Name, ...]:
    """Projections of queries, keys, values and output, with biases if the model has them."""
    return (
        linear("attention.query", "self_attn.q_proj", "Q D", order=order and _of_heads(order, "query")),
        linear("attention.key", "self_attn.k_proj", "K D", order=order and _of_heads(order, "key")),
        linear("attention.value", "self_attn.v_proj", "K D"),
        linear("attention.output", "self_attn.o_proj", "D Q"),
    )


def attention_biases(*, output: bool = True) -> tuple[Name, ...]:
    """Their biases."""
    found = tuple(
        bias(f"attention.{ours}", f"self_attn.{disk}", shape, "attention.qkv_bias")
        for ours, disk, shape in (("query", "q_proj", "Q"), ("key", "k_proj", "K"), ("value", "v_proj", "K"))
    )
    last = bias("attention.output", "self_attn.o_proj", "D", "attention.output_bias")
    return (*found, last) if output else found


def query_key_norms(kind: str, query: str = "q_norm", key: str = "k_norm") -> tuple[Name, ...]:
    """Norms of queries and keys, there when the model has that kind."""
    widths = ("Q", "K") if kind == "full" else ("h", "h")
    there: Mapping[str, object] = {"attention.qk_norm": kind}
    return (
        linear("attention.query_norm", f"self_attn.{query}", widths[0], when=there),
        linear("attention.key_norm", f"self_attn.{key}", widths[1], when=there),
    )


def swiglu_packed(ours: str, gate_up: str, down: str) -> tuple[Name, ...]:
    """A shared expert whose gate and up are one matrix on disk, gate above up."""
    both = (f"{LAYER}{gate_up}.weight",)
    return (
        Name(f"{OURS}{ours}.gate.weight", both, ("S", "D"), "sparse", part=(0, 2)),
        Name(f"{OURS}{ours}.up.weight", both, ("S", "D"), "sparse", part=(1, 2)),
        linear(f"{ours}.down", down, "D S", "sparse"),
    )


def norms(*pairs: tuple[str, str]) -> tuple[Name, ...]:
    """Norms of a layer: (ours, theirs)."""
    return tuple(linear(ours, disk, "D") for ours, disk in pairs)


def norm_biases(*pairs: tuple[str, str]) -> tuple[Name, ...]:
    """Their biases."""
    return tuple(Name(f"{OURS}{ours}.bias", (f"{LAYER}{disk}.bias",), ("D",)) for ours, disk in pairs)


def interleaved(width: int) -> list[int]:
    """Which of the columns of pairs side by side each column of pairs half a width apart is."""
    return [*range(0, width, 2), *range(1, width, 2)]


def _of_heads(order: Callable[[ModelConfig], list[int]], kind: str) -> Callable[[ModelConfig], list[int]]:
    """The rows of all heads, from those of one."""

    def rows(model: ModelConfig) -> list[int]:
        head = order(model)
        count = model.attention.num_heads if kind == "query" else model.num_kv_heads
        return [index * len(head) + row for index in range(count) for row in head]

    return rows


def whole_head(model: ModelConfig) -> list[int]:
    """A head of which all columns are rotated, in pairs side by side."""
    return interleaved(model.head_dim)


def _last_of_head(model: ModelConfig) -> list[int]:
    """A head of latent attention: its last columns are rotated."""
    latent = model.attention.latent
    assert latent is not None
    nope = latent.nope_head_dim
    return [*range(nope), *(nope + row for row in interleaved(latent.rope_head_dim))]


def _latent_rows(model: ModelConfig) -> list[int]:
    """The rows of the projection to the latent: the last give the key's rotated part."""
    latent = model.attention.latent
    assert latent is not None
    return [*range(latent.kv_rank), *(latent.kv_rank + row for row in interleaved(latent.rope_head_dim))]


def gate_up_rows(model: ModelConfig) -> list[int]:
    """Gate and up rows that take turns on disk."""
    assert model.moe is not None
    return interleaved(2 * model.moe.expert_intermediate_size)


_FULL_QUERY: Mapping[str, object] = {"attention.latent.query_rank": None}
_LATENT_QUERY: Mapping[str, object] = {"attention.latent.query_rank": SET}
_QUERY_ROWS = _of_heads(_last_of_head, "query")

LATENT_ATTENTION = (
    linear("attention.query", "self_attn.q_proj", "Q D", when=_FULL_QUERY, order=_QUERY_ROWS),
    linear("attention.query_down", "self_attn.q_a_proj", "q D", when=_LATENT_QUERY),
    linear("attention.query_norm", "self_attn.q_a_layernorm", "q", when=_LATENT_QUERY),
    linear("attention.query_up", "self_attn.q_b_proj", "Q q", when=_LATENT_QUERY, order=_QUERY_ROWS),
    linear("attention.kv_down", "self_attn.kv_a_proj_with_mqa", "cr D", order=_latent_rows),
    linear("attention.kv_norm", "self_attn.kv_a_layernorm", "c"),
    linear("attention.kv_up", "self_attn.kv_b_proj", "U c"),
    linear("attention.output", "self_attn.o_proj", "D O"),
    bias("attention.query_down", "self_attn.q_a_proj", "q", "attention.qkv_bias", when=_LATENT_QUERY),
    bias("attention.kv_down", "self_attn.kv_a_proj_with_mqa", "cr", "attention.qkv_bias", order=_latent_rows),
    bias("attention.output", "self_attn.o_proj", "D", "attention.output_bias"),
)
EMBEDDINGS = (
    Name("embed.weight", ("model.embed_tokens.weight",), ("V", "D"), "none"),
    Name("norm.weight", ("model.norm.weight",), ("D",), "none"),
    Name("head.weight", ("lm_head.weight",), ("V", "D"), "none", {"tie_embeddings": False}),
)
PRE_NORMS = norms(("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))
POST_NORMS = norms(
    ("attention_post_norm", "post_attention_layernorm"), ("ffn_post_norm", "post_feedforward_layernorm")
)
DENSE = swiglu("ffn", "mlp", "I", "dense")
_MODULE = "predictions.{depth}."
PREDICTION = (
    *(
        Name(_MODULE + ours, (LAYER + disk,), tuple(shape.split()), "prediction")
        for ours, disk, shape in (
            ("embedding_norm.weight", "enorm.weight", "D"),
            ("hidden_norm.weight", "hnorm.weight", "D"),
            ("project.weight", "eh_proj.weight", "D 2D"),
            ("norm.weight", "shared_head.norm.weight", "D"),
        )
    ),
    Name("embed.weight", (LAYER + "embed_tokens.weight",), ("V", "D"), "prediction", copy=True),
    Name(
        "head.weight",
        (LAYER + "shared_head.head.weight",),
        ("V", "D"),
        "prediction",
        {"tie_embeddings": False},
        copy=True,
    ),
)
"""Modules behind the last layer, numbered on, with blocks by the names of layers."""
BODY = tuple(chain(EMBEDDINGS, PRE_NORMS, attention()))
