"""Queries, keys, values -> what each query reads of the past, perhaps of a window of it, perhaps beside a sink.

B sequences, S positions, h query heads, g key heads, d width of queries and keys, v width of values, W window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.model.documents import Documents


def attend(
    q_BShd: Tensor,
    k_BSgd: Tensor,
    v_BSgv: Tensor,
    scale: float,
    window: int | None = None,
    sinks_h: Tensor | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """[B, S, h, v]: softmax(scale q k^T) v over positions up to one's own, of which a `window` counts the nearest.

    `sinks_h` are logits that take part in the softmax and add nothing (arXiv:2309.17453). With `documents`, what lies
    before one's own document isn't seen either.
    """
    if documents is not None:
        return documents.apart(
            lambda q, k, v: attend(q, k, v, scale, window, sinks_h), q_BShd, k_BSgd, v_BSgv
        )
    q, k, v = q_BShd.transpose(1, 2), k_BSgd.transpose(1, 2), v_BSgv.transpose(1, 2)
    length = q.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if window is not None and window < length:
        mixed = _windowed(q, k, v, scale, window, sinks_h)
    elif sinks_h is None:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        # Before the first position comes one that all see: its key gives the sink's logit, its value is 0, and
        # its own query is nobody's.
        q, k, v = _with_sink(q, k, v, scale, sinks_h)
        q = F.pad(q, (0, 0, 1, 0))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        mixed = mixed[:, :, 1:]
    return mixed.transpose(1, 2)


def _with_sink(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sinks_h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Eight columns more, in the first of which queries hold their head's sink and the new first key a 1."""
    sink = (sinks_h / scale).to(q.dtype).view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    q = F.pad(torch.cat((q, sink), dim=-1), (0, 7))
    first = F.pad(k.new_ones(*k.shape[:2], 1, 1), (k.shape[-1], 7))
    k = torch.cat((first, F.pad(k, (0, 8))), dim=2)
    return q, k, F.pad(v, (0, 0, 1, 0))


def _windowed(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sinks_h: Tensor | None) -> Tensor:
    """Blocks of W queries see their own block and the one before: work and memory grow with S W, not S S."""
    batch, _, length, _ = q.shape
    blocks = -(-length // window)
    missing = blocks * window - length
    q = F.pad(q, (0, 0, 0, missing)).unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)
    k, v = (_pairs_of_blocks(x, window, blocks, missing) for x in (k, v))
    place_W = torch.arange(window, device=q.device)
    ago_WX = window + place_W.unsqueeze(1) - torch.arange(2 * window, device=q.device)
    seen = ((ago_WX >= 0) & (ago_WX < window)).expand(blocks, -1, -1).clone()
    seen[0, :, :window] = False  # before the first block there is none
    if sinks_h is not None:
        q, k, v = _with_sink(q, k, v, scale, sinks_h)
        seen = F.pad(seen, (1, 0), value=True)
    mask = seen.repeat(batch, 1, 1).unsqueeze(1)
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    whole: Tensor = mixed.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)
    return whole[:, :, :length]


def _pairs_of_blocks(x: Tensor, window: int, blocks: int, missing: int) -> Tensor:
    """[B, g, S, d] -> [B blocks, g, 2 W, d]: each block behind the one before it."""
    padded = F.pad(x, (0, 0, window, missing)).unflatten(2, (blocks + 1, window))
    pairs = torch.cat((padded[:, :, :-1], padded[:, :, 1:]), dim=3)
    return pairs.transpose(1, 2).flatten(0, 1)
