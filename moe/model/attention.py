"""Tokens mix: causal grouped-query attention.

B sequences, S positions, P of them on this rank, D width, H query heads, G key heads, h and g of them on this rank
while it has all positions, d head width. P is S, h is H and g is G unless ranks share sequences.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.norm import RMSNorm
from moe.model.rope import Rotation
from moe.model.ulysses import SequenceGroup
from moe.sparse.linear import Linear


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over the past, H / G query heads to a key head (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, sequence_group: SequenceGroup | None = None) -> None:
        super().__init__()
        self.sequence_group = sequence_group or SequenceGroup()
        heads, kv_heads, bias = config.attention.num_heads, config.num_kv_heads, config.attention.qkv_bias
        self.head_dim = config.head_dim
        self.query = Linear(config.hidden_size, heads * self.head_dim, bias=bias)
        self.key = Linear(config.hidden_size, kv_heads * self.head_dim, bias=bias)
        self.value = Linear(config.hidden_size, kv_heads * self.head_dim, bias=bias)
        self.output = Linear(heads * self.head_dim, config.hidden_size, bias=False)
        norm = config.attention.qk_norm
        self.query_norm = RMSNorm(self.head_dim, config.norm_eps) if norm else None
        self.key_norm = RMSNorm(self.head_dim, config.norm_eps) if norm else None

    def forward(self, x_BPD: Tensor, rotation: Rotation) -> Tensor:
        """[B, P, D] -> [B, P, D]; position s sees positions 0 to s, wherever they are. `rotation`: of all S."""
        q_BPHd = self._heads(self.query(x_BPD))
        k_BPGd = self._heads(self.key(x_BPD))
        v_BPGd = self._heads(self.value(x_BPD))
        if self.query_norm is not None and self.key_norm is not None:
            q_BPHd, k_BPGd = self.query_norm(q_BPHd), self.key_norm(k_BPGd)
        q_BShd, k_BSgd, v_BSgd = self.sequence_group.scatter_heads(q_BPHd, k_BPGd, v_BPGd)
        mixed_BhSd = F.scaled_dot_product_attention(
            rotation.apply(q_BShd.transpose(1, 2)),
            rotation.apply(k_BSgd.transpose(1, 2)),
            v_BSgd.transpose(1, 2),
            is_causal=True,
            enable_gqa=q_BShd.shape[2] != k_BSgd.shape[2],
        )
        mixed_BPHd = self.sequence_group.gather_heads(mixed_BhSd.transpose(1, 2))
        y_BPD: Tensor = self.output(mixed_BPHd.flatten(2))
        return y_BPD

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)
