"""Hidden states and the tokens that follow -> hidden states that foretell one token more.

B sequences, S positions, D width.
"""

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.block import Block
from moe.model.documents import Documents
from moe.model.norm import norm
from moe.model.rope import Rotation
from moe.sparse import Jitter, RoutingRecord
from moe.sparse.linear import Linear


class Prediction(nn.Module):
    """norm(block(M [norm(e); norm(h)])), with embedding and head of the model behind which it stands.

    arXiv:2412.19437, section 2.2, eq. 21-23.

    As in stock `transformers`, h is the output of the model's last norm, and e comes first.
    """

    def __init__(self, config: ModelConfig, block: Block) -> None:
        super().__init__()
        self.embedding_norm = norm(config)
        self.hidden_norm = norm(config)
        self.project = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = block
        self.norm = norm(config)

    def forward(
        self,
        h_BSD: Tensor,
        next_BSD: Tensor,
        rotation: Rotation,
        mask_BS: Tensor | None = None,
        jitter: Jitter | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """`next_BSD`: embeddings of the tokens that `h_BSD` foretells; both [B, S, D]."""
        both = torch.cat((self.embedding_norm(next_BSD), self.hidden_norm(h_BSD)), dim=-1)
        x_BSD, record = self.block(self.project(both), rotation, mask_BS, jitter, documents)
        y_BSD: Tensor = self.norm(x_BSD)
        return y_BSD, record


def ahead(x_BS: Tensor, positions: int) -> Tensor:
    """[B, S] -> [B, S]: what stands so many positions later; zeros (False) where a sequence has ended."""
    later = torch.zeros_like(x_BS)
    later[:, : x_BS.shape[1] - positions] = x_BS[:, positions:]
    return later


def following(x_BS: Tensor, documents: Documents | None) -> Tensor:
    """What stands at the next position; zero (False) where a sequence, or a document, has ended."""
    return ahead(x_BS, 1) if documents is None else documents.ahead(x_BS)
