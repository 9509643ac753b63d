"""A decoder-only Transformer: a layer is a token mixer followed by a channel mixer, dense or sparse."""

from moe.model.count import Count, count, kept_by_experts, kept_sentence
from moe.model.init import initialize
from moe.model.transformer import ModelOutput, Transformer
from moe.model.ulysses import SequenceGroup

__all__ = [
    "Count",
    "ModelOutput",
    "SequenceGroup",
    "Transformer",
    "count",
    "initialize",
    "kept_by_experts",
    "kept_sentence",
]
