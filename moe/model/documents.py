"""Which document each token belongs to -> attention inside documents, and positions that restart with each.

B sequences, S positions, N = B S tokens, R documents in a sheet, L positions of each of them,
D documents, h query heads, g key heads, d width of queries and keys, v width of values.

Documents of about one length make a sheet: rows of one document each, filled up with copies of its last token. As
attention is causal, the copies are seen by nobody but themselves, and no mask is needed: whatever attention does with
whole sequences, windows and sinks included, it does with sheets. They are at most half as long again as documents are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_SHORTEST = 16
"""Positions of the narrowest sheet."""


@dataclass(frozen=True)
class Documents:
    """Where documents begin and end in the rows of a micro-batch. Make one with `of`."""

    sheets: tuple[Tensor, ...]
    """int64 [R, L] each: tokens of the micro-batch."""
    back_N: Tensor
    """int64: where each token stands in all sheets, one behind the other."""
    positions_BS: Tensor
    """int64: each token's position in its document, from 0."""
    same_BS: Tensor
    """bool: whether the next position of the row belongs to the same document; False at the end of a row."""

    @classmethod
    def of(cls, documents_BS: Tensor, device: torch.device) -> "Documents | None":
        """From ids (integers; equal neighbours are one document), best given on the CPU: else this waits for the
        device. None if every row is one document, where plain causal attention is right.
        """
        ids_BS = documents_BS.cpu()
        batch, length = ids_BS.shape
        begins_BS = torch.ones(batch, length, dtype=torch.bool)
        begins_BS[:, 1:] = ids_BS[:, 1:] != ids_BS[:, :-1]
        if not bool(begins_BS[:, 1:].any()):
            return None
        first_D = begins_BS.flatten().nonzero().flatten()
        total = batch * length
        length_D = torch.diff(first_D, append=torch.tensor([total]))
        document_N = begins_BS.flatten().cumsum(0) - 1
        position_N = torch.arange(total) - first_D[document_N]
        sheets, back_N, offset = [], torch.empty(total, dtype=torch.int64), 0
        width_D = _widths(length_D, length)
        for width in width_D.unique().tolist():
            here_R = (width_D == width).nonzero().flatten()
            inside_RL = torch.arange(width) < length_D[here_R, None]
            last_R1 = length_D[here_R, None] - 1
            place_RL = first_D[here_R, None] + torch.arange(width).minimum(last_R1)
            back_N[place_RL[inside_RL]] = offset + inside_RL.flatten().nonzero().flatten()
            sheets.append(place_RL.to(device))
            offset += place_RL.numel()
        same_BS = torch.cat((~begins_BS[:, 1:], torch.zeros(batch, 1, dtype=torch.bool)), dim=1)
        return cls(
            tuple(sheets),
            back_N.to(device),
            position_N.view(batch, length).to(device),
            same_BS.to(device),
        )

    def apart(
        self,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        q_BShd: Tensor,
        k_BSgd: Tensor,
        v_BSgv: Tensor,
    ) -> Tensor:
        """What `attend` (queries, keys, values -> [B, S, h, v]) gives for each document on its own."""
        q, k, v = q_BShd.flatten(0, 1), k_BSgd.flatten(0, 1), v_BSgv.flatten(0, 1)
        mixed = [attend(*(_rows(x, places) for x in (q, k, v))).flatten(0, 1) for places in self.sheets]
        whole: Tensor = torch.cat(mixed).index_select(0, self.back_N).unflatten(0, q_BShd.shape[:2])
        return whole

    def ahead(self, x_BS: Tensor) -> Tensor:
        """What stands at the next position of the same document; zero (False) at its end."""
        return torch.where(self.same_BS, x_BS.roll(-1, dims=1), torch.zeros_like(x_BS))


def _rows(x: Tensor, places_RL: Tensor) -> Tensor:
    rows: Tensor = x.index_select(0, places_RL.flatten()).unflatten(0, places_RL.shape)
    return rows


def _widths(length_D: Tensor, longest: int) -> Tensor:
    """The least of 16, 24, 32, 48, 64, 96... that holds each document, or the row's length."""
    power_D = 2 ** torch.ceil(torch.log2(length_D.clamp(min=_SHORTEST).double())).long()
    narrow_D = power_D // 4 * 3
    width_D = torch.where((length_D <= narrow_D) & (narrow_D >= _SHORTEST), narrow_D, power_D)
    return width_D.clamp(max=longest)
