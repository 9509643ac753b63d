"""An attention mask -> an order in which a causal model reads the positions that count, one after another.

Padding on the right needs no mask where attention looks only back. Padding on the left, or in between, is moved to the
right for the model and back for the caller: positions then count from the first token, as `transformers` has them.

B sequences, S positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.errors import ConfigError


@dataclass(frozen=True)
class Order:
    """How positions are rearranged."""

    kept_BS: Tensor | None
    """bool, as the model reads them: whether each counts; None: all do."""
    order_BS: Tensor | None
    """int64: which position comes at each place; None: as they are."""

    @classmethod
    def of(cls, mask: Tensor | None, input_ids_BS: Tensor) -> "Order":
        """Of a mask [B, S], 1 where a position counts. Raises `ConfigError` for any other shape."""
        if mask is None:
            return cls(None, None)
        if mask.shape != input_ids_BS.shape:
            raise ConfigError(
                f"attention_mask has shape {list(mask.shape)}, but input_ids {list(input_ids_BS.shape)}: it must say "
                f"of each token whether it counts. Masks of pairs of tokens are not supported."
            )
        counts_BS = mask.to(input_ids_BS.device).bool()
        if bool(counts_BS.all()):
            return cls(None, None)
        order_BS = torch.argsort(~counts_BS, dim=1, stable=True)
        kept_BS = counts_BS.gather(1, order_BS)
        return cls(kept_BS, None if torch.equal(kept_BS, counts_BS) else order_BS)

    def closed_up(self, ids_BS: Tensor) -> Tensor:
        """What counts first, in its order."""
        return ids_BS if self.order_BS is None else ids_BS.gather(1, self.order_BS)

    def put_back(self, x_BSX: Tensor) -> Tensor:
        """Each position's row [B, S, X] where the caller has that position."""
        if self.order_BS is None:
            return x_BSX
        return x_BSX.gather(1, self.order_BS.argsort(dim=1).unsqueeze(-1).expand_as(x_BSX))
