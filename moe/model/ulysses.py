"""All heads of some positions <-> some heads of all positions: attention over ranks (arXiv:2309.14509).

B sequences, S positions, P = S / G of them on a rank, H heads, h = H / G of them on a rank, d head width, G ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe.sparse.collectives import Exchange


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share sequences: rank g of them has the g-th of G equal parts of every one's positions."""

    size: int = 1
    group: dist.ProcessGroup | None = None

    def scatter_heads(self, *x_BPHd: Tensor) -> tuple[Tensor, ...]:
        """Each [B, P, H, d] -> [B, S, h, d], in one all-to-all for all; H may differ. Rank g gets the g-th h heads."""
        if self.size == 1:
            return x_BPHd
        by_rank_BPGhd = [x.unflatten(2, (self.size, -1)) for x in x_BPHd]
        sent_GBPhd = torch.cat(by_rank_BPGhd, dim=3).movedim(2, 0)
        whole_BShd = self._exchange(sent_GBPhd).movedim(0, 1).flatten(1, 2)
        return torch.split(whole_BShd, [x.shape[3] for x in by_rank_BPGhd], dim=2)

    def gather_heads(self, x_BShd: Tensor) -> Tensor:
        """[B, S, h, d] -> [B, P, H, d]: the way back."""
        if self.size == 1:
            return x_BShd
        sent_GBPhd = x_BShd.unflatten(1, (self.size, -1)).movedim(1, 0)
        return self._exchange(sent_GBPhd).movedim(0, 2).flatten(2, 3)

    def _exchange(self, x_G: Tensor) -> Tensor:
        """Entry g goes to rank g; entry g of the result came from there. Gradients go the same way back."""
        exchange = Exchange([1] * self.size, [1] * self.size, self.group)
        return exchange.wait(exchange.start(x_G))
