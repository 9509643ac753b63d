"""All heads of some positions <-> some heads of all positions: attention over ranks (arXiv:2309.14509).

B sequences, S positions, P = S / G of them on a rank, H heads, h = H / G of them on a rank, d head width, G ranks.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from moe.sparse.collectives import Exchange


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share sequences: rank g of them has the g-th of G equal parts of every one's positions."""

    size: int = 1
    group: dist.ProcessGroup | None = None

    def scatter_heads(self, *x_BPHd: Tensor) -> tuple[Tensor, ...]:
        """Each [B, P, H, d] -> [B, S, h, d], travelling together; H may differ. Rank g gets the g-th h heads."""
        if self.size == 1:
            return x_BPHd
        # Each in an exchange of its own: out of a shared one a view of v would keep q and k alive until backward.
        exchanges = [self._exchange() for _ in x_BPHd]
        sent_GBPhd = [x.unflatten(2, (self.size, -1)).movedim(2, 0) for x in x_BPHd]
        started = [exchange.start(x) for exchange, x in zip(exchanges, sent_GBPhd, strict=True)]
        arrived_GBPhd = [exchange.wait(x) for exchange, x in zip(exchanges, started, strict=True)]
        return tuple(x.movedim(0, 1).flatten(1, 2) for x in arrived_GBPhd)

    def gather_heads(self, x_BShd: Tensor) -> Tensor:
        """[B, S, h, d] -> [B, P, H, d]: the way back."""
        if self.size == 1:
            return x_BShd
        exchange = self._exchange()
        arrived_GBPhd = exchange.wait(exchange.start(x_BShd.unflatten(1, (self.size, -1)).movedim(1, 0)))
        return arrived_GBPhd.movedim(0, 2).flatten(2, 3)

    def own_heads(self, x_H: Tensor) -> Tensor:
        """[H] -> [h]: what belongs to the heads that this rank has all positions of."""
        return x_H if self.size == 1 else x_H.chunk(self.size)[dist.get_rank(self.group)]

    def _exchange(self) -> Exchange:
        """Entry g goes to rank g; entry g of what arrives came from there."""
        return Exchange([1] * self.size, [1] * self.size, self.group)
