"""Tokens mix: causal attention, grouped or latent.

B sequences, S positions, P of them on this rank, D width, H query heads, G key heads, h and g of them on this rank
while it has all positions, d width of queries and keys, v width of values, c width of the latent. P is S, h is H and g
is G unless ranks share sequences.
"""

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.attend import attend
from moe.model.documents import Documents
from moe.model.norm import RMSNorm
from moe.model.rope import Rotation, logit_factor
from moe.model.ulysses import SequenceGroup
from moe.sparse.linear import Linear

LATENT_EPS = 1e-6
"""Epsilon of the norms of latents, whatever the model's (DeepSeek-V2's code)."""


class Attention(nn.Module):
    """softmax(scale q k^T) v over the past; how q, k and v come about is a subclass's own."""

    def __init__(self, config: ModelConfig, index: int, sequence_group: SequenceGroup | None = None) -> None:
        """`index` is the layer's, which may decide on window and rotation."""
        super().__init__()
        attention, heads = config.attention, config.attention.num_heads
        self.sequence_group = sequence_group or SequenceGroup()
        self.head_dim, self.value_head_dim = config.head_dim, config.value_head_dim
        self.window, self.rotates = attention.window(index), attention.rotates(index)
        self.scale = attention.scale or self.head_dim**-0.5
        width = heads * self.value_head_dim
        self.output = Linear(width, config.hidden_size, bias=attention.output_bias)
        self.gate = Linear(config.hidden_size, width, bias=False) if attention.output_gate else None
        self.sinks = nn.Parameter(torch.empty(heads)) if attention.sinks else None

    def forward(self, x_BPD: Tensor, rotation: Rotation, documents: Documents | None = None) -> Tensor:
        """[B, P, D] -> [B, P, D]; position s sees positions 0 to s of its document, wherever they are.

        `rotation` and `documents`: of all S.
        """
        q_BShd, k_BSgd, v_BSgv = self.project(x_BPD, rotation)
        sinks_h = None if self.sinks is None else self.sequence_group.own_heads(self.sinks)
        mixed_BShv = attend(q_BShd, k_BSgd, v_BSgv, self.scale, self.window, sinks_h, documents)
        mixed_BPX = self.sequence_group.gather_heads(mixed_BShv).flatten(2)
        if self.gate is not None:
            mixed_BPX = mixed_BPX * torch.sigmoid(self.gate(x_BPD))
        y_BPD: Tensor = self.output(mixed_BPX)
        return y_BPD

    def project(self, x_BPD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """[B, P, D] -> queries [B, S, h, d], keys [B, S, g, d], values [B, S, g, v], rotated."""
        raise NotImplementedError("a subclass's own")


class GroupedAttention(Attention):
    """H / G query heads to a key head (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, index: int, sequence_group: SequenceGroup | None = None) -> None:
        super().__init__(config, index, sequence_group)
        attention, hidden = config.attention, config.hidden_size
        query, kv = attention.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.query = Linear(hidden, query, bias=attention.qkv_bias)
        self.key = Linear(hidden, kv, bias=attention.qkv_bias)
        self.value = Linear(hidden, kv, bias=attention.qkv_bias)
        self.qk_norm, self.clip = attention.qk_norm, attention.clip_qkv
        full, none = self.qk_norm == "full", self.qk_norm == "none"
        self.query_norm = None if none else RMSNorm(query if full else self.head_dim, config.norm_eps)
        self.key_norm = None if none else RMSNorm(kv if full else self.head_dim, config.norm_eps)

    def project(self, x_BPD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.query(x_BPD), self.key(x_BPD), self.value(x_BPD)
        if self.qk_norm == "full":
            q, k = self._normed(q, k)
        if self.clip is not None:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.qk_norm == "head":
            q, k = self._normed(q, k)
        q, k, v = self.sequence_group.scatter_heads(q, k, v)
        if self.rotates:
            q, k = (rotation.apply(x.transpose(1, 2)).transpose(1, 2) for x in (q, k))
        if self.qk_norm == "after_rotation":
            q, k = self._normed(q, k)
        return q, k, v

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.query_norm is not None
        assert self.key_norm is not None
        return self.query_norm(q), self.key_norm(k)


class LatentAttention(Attention):
    """Keys and values from one latent (MLA, arXiv:2405.04434, section 2.1, eq. 9-19)."""

    def __init__(self, config: ModelConfig, index: int, sequence_group: SequenceGroup | None = None) -> None:
        super().__init__(config, index, sequence_group)
        attention, latent, hidden = config.attention, config.attention.latent, config.hidden_size
        assert latent is not None
        self.latent = latent
        self.scale *= logit_factor(attention.rope_scaling)
        query = attention.num_heads * self.head_dim
        bias = attention.qkv_bias
        if latent.query_rank is None:
            self.query = Linear(hidden, query, bias=False)
        else:
            self.query_down = Linear(hidden, latent.query_rank, bias=bias)
            self.query_norm = RMSNorm(latent.query_rank, LATENT_EPS)
            self.query_up = Linear(latent.query_rank, query, bias=False)
        self.kv_down = Linear(hidden, latent.kv_rank + latent.rope_head_dim, bias=bias)
        self.kv_norm = RMSNorm(latent.kv_rank, LATENT_EPS)
        width = attention.num_heads * (latent.nope_head_dim + latent.value_head_dim)
        self.kv_up = Linear(latent.kv_rank, width, bias=False)

    def project(self, x_BPD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        latent = self.latent
        whole = latent.query_rank is None
        q = self.query(x_BPD) if whole else self.query_up(self.query_norm(self.query_down(x_BPD)))
        q_BPHd = q.unflatten(-1, (-1, self.head_dim))
        c_BPc, shared_BPr = self.kv_down(x_BPD).split([latent.kv_rank, latent.rope_head_dim], dim=-1)
        kv_BPH = self.kv_up(self.kv_norm(c_BPc)).unflatten(
            -1, (-1, latent.nope_head_dim + latent.value_head_dim)
        )
        nope_BPHn, v_BPHv = kv_BPH.split([latent.nope_head_dim, latent.value_head_dim], dim=-1)
        shared_BPHr = shared_BPr.unsqueeze(2).expand(-1, -1, nope_BPHn.shape[2], -1)
        k_BPHd = torch.cat((nope_BPHn, shared_BPHr), dim=-1)
        q_BShd, k_BShd, v_BShv = self.sequence_group.scatter_heads(q_BPHd, k_BPHd, v_BPHv)
        return self._rotated(q_BShd, rotation), self._rotated(k_BShd, rotation), v_BShv

    def _rotated(self, x_BShd: Tensor, rotation: Rotation) -> Tensor:
        if not self.rotates:
            return x_BShd
        nope, rope = x_BShd.split([self.latent.nope_head_dim, self.latent.rope_head_dim], dim=-1)
        return torch.cat((nope, rotation.apply(rope.transpose(1, 2)).transpose(1, 2)), dim=-1)


def attention(config: ModelConfig, index: int, sequence_group: SequenceGroup | None = None) -> Attention:
    """The attention of a layer."""
    kind = GroupedAttention if config.attention.latent is None else LatentAttention
    return kind(config, index, sequence_group)
