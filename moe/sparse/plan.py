"""Expert ids -> which token goes to which rank, and to which experts there; integers only.

T tokens here, K choices, E experts, e experts held here, G ranks of the group, N rows sent (one for each rank
that a token needs), M rows received.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe.config.numbers import choice, divisors
from moe.errors import ConfigError
from moe.sparse.collectives import exchange_counts
from moe.sparse.copies import Copies, copies_of


@dataclass(frozen=True)
class ExpertLayout:
    """Which experts live on which rank: rank r of the group holds experts [r e, (r + 1) e)."""

    num_experts: int
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        """Raises `ConfigError`: experts that cannot be shared equally, or a rank that is not in the group."""
        if self.size < 1 or self.num_experts % self.size:
            raise ConfigError(
                f"expert_parallel_size is {self.size}, but {self.num_experts} experts cannot be shared equally by so "
                f"many ranks. Use {choice(divisors(self.num_experts))}."
            )
        if not 0 <= self.rank < self.size:
            raise ConfigError(
                f"rank {self.rank} is not one of a group of {self.size}. Use 0 to {self.size - 1}."
            )

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.size

    @property
    def local_experts(self) -> range:
        """Global ids of the experts held here."""
        return range(self.rank * self.num_local_experts, (self.rank + 1) * self.num_local_experts)


@dataclass(frozen=True)
class Trip:
    """Tokens that travel: one row for each rank that holds an expert the token chose."""

    to_rank: Copies
    """T tokens, G choices: the rows to send, those for one rank side by side."""
    local_ids_NK: Tensor
    """int64: each row's choices as ids among the experts of its rank; e for a choice that lies elsewhere."""
    send_splits: list[int]
    """Rows for each rank of the group."""
    receive_splits: list[int]
    """Rows from each rank of the group."""
    num_choices: int
    """Choices that the experts here will serve."""


def plan_trip(ids_TK: Tensor, layout: ExpertLayout, sent_TK: Tensor | None = None) -> Trip:
    """Sort tokens by rank and learn from the group how many rows arrive.

    Choices outside `sent_TK` (bool: masked tokens, full experts) stay at home. One exchange of two int64 counts
    per rank pair and one copy to the host, which the sort overlaps; nothing here has a gradient.
    """
    held = layout.num_local_experts
    rank_TK = ids_TK // held
    sent = torch.ones_like(rank_TK) if sent_TK is None else sent_TK.to(rank_TK.dtype)
    choices_TG = rank_TK.new_zeros(len(ids_TK), layout.size).scatter_add_(1, rank_TK, sent)
    needed_TG = choices_TG > 0
    sent_G2 = torch.stack([needed_TG.sum(0), choices_TG.sum(0)], 1)
    received_G2 = exchange_counts(sent_G2, layout.group)
    # rows sent, choices sent, rows received, choices received: each a list over ranks
    numbers = _ToHost(torch.cat([sent_G2.t(), received_G2.t()]))
    ranks_TG = torch.arange(layout.size, device=ids_TK.device).expand_as(needed_TG)
    to_rank = copies_of(ranks_TG, layout.size, needed_TG, lambda: sum(numbers.lists()[0]))
    send_splits, _, receive_splits, received_choices = numbers.lists()
    token_N, rank_N = to_rank.source_of_row_R, to_rank.choice_of_row_R % layout.size
    local_NK = ids_TK[token_N] - (rank_N * held).unsqueeze(1)
    elsewhere_NK = (local_NK < 0) | (local_NK >= held)
    if sent_TK is not None:
        elsewhere_NK |= ~sent_TK[token_N]
    return Trip(
        to_rank=to_rank,
        local_ids_NK=local_NK.masked_fill_(elsewhere_NK, held),
        send_splits=send_splits,
        receive_splits=receive_splits,
        num_choices=sum(received_choices),
    )


class _ToHost:
    """Integers on their way to the host, so that the device's next work need not wait for them."""

    def __init__(self, numbers: Tensor) -> None:
        self.arrived: torch.cuda.Event | None = None
        self.copy = numbers
        if numbers.is_cuda:
            self.copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.copy.copy_(numbers, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def lists(self) -> list[list[int]]:
        """Its rows; waits until they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.copy.tolist()
