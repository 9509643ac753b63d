"""Tokens mix: causal grouped-query attention.

B sequences, S positions, D width, H query heads, G key heads, d head width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.norm import RMSNorm
from moe.model.rope import Rotation
from moe.sparse.linear import Linear


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over the past, H / G query heads to a key head (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, kv_heads, bias = config.attention.num_heads, config.num_kv_heads, config.attention.qkv_bias
        self.head_dim = config.head_dim
        self.query = Linear(config.hidden_size, heads * self.head_dim, bias=bias)
        self.key = Linear(config.hidden_size, kv_heads * self.head_dim, bias=bias)
        self.value = Linear(config.hidden_size, kv_heads * self.head_dim, bias=bias)
        self.output = Linear(heads * self.head_dim, config.hidden_size, bias=False)
        norm = config.attention.qk_norm
        self.query_norm = RMSNorm(self.head_dim, config.norm_eps) if norm else None
        self.key_norm = RMSNorm(self.head_dim, config.norm_eps) if norm else None

    def forward(self, x_BSD: Tensor, rotation: Rotation) -> Tensor:
        """[B, S, D] -> [B, S, D]; position s sees positions 0 to s."""
        q_BSHd = self._heads(self.query(x_BSD))
        k_BSGd = self._heads(self.key(x_BSD))
        v_BSGd = self._heads(self.value(x_BSD))
        if self.query_norm is not None and self.key_norm is not None:
            q_BSHd, k_BSGd = self.query_norm(q_BSHd), self.key_norm(k_BSGd)
        mixed_BHSd = F.scaled_dot_product_attention(
            rotation.apply(q_BSHd.transpose(1, 2)),
            rotation.apply(k_BSGd.transpose(1, 2)),
            v_BSGd.transpose(1, 2),
            is_causal=True,
            enable_gqa=q_BSHd.shape[2] != k_BSGd.shape[2],
        )
        y_BSD: Tensor = self.output(mixed_BHSd.transpose(1, 2).flatten(2))
        return y_BSD

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)
