"""A decoder layer: mix tokens, then mix channels, each behind a norm and around a residual.

B sequences, S positions, D width.
"""

from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.attention import attention
from moe.model.documents import Documents
from moe.model.norm import norm
from moe.model.rope import Rotation
from moe.model.ulysses import SequenceGroup
from moe.sparse import Capacity, Dispatcher, ExpertLayout, Jitter, RoutingRecord, SparseMoE
from moe.sparse.spare import Spare
from moe.sparse.swiglu import SwiGLU


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); the ffn is dense or sparse. Norms may stand behind instead."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        layout: ExpertLayout,
        capacity: Capacity | None = None,
        recompute_experts: bool = False,
        dispatcher: Dispatcher | None = None,
        sequence_group: SequenceGroup | None = None,
        spare: Spare | None = None,
    ) -> None:
        super().__init__()
        before, behind = config.norm_placement != "post", config.norm_placement != "pre"
        self.attention_norm = norm(config) if before else None
        self.attention = attention(config, index, sequence_group)
        self.attention_post_norm = norm(config) if behind else None
        self.ffn_norm = norm(config) if before else None
        self.ffn_post_norm = norm(config) if behind else None
        self.multiplier = config.residual_multiplier
        self.ffn: SparseMoE | SwiGLU
        if config.moe is not None and index in config.sparse_layers:
            self.ffn = SparseMoE(
                config.hidden_size, config.moe, layout, capacity, recompute_experts, dispatcher, spare
            )
        else:
            assert config.intermediate_size is not None, "checked by moe.config.rules"
            self.ffn = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        mask_BS: Tensor | None = None,
        jitter: Jitter | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """[B, S, D] -> [B, S, D] and, from a sparse layer, its routing."""
        h_BSD = self.attention(_maybe(self.attention_norm, x_BSD), rotation, documents)
        x_BSD = self._add(x_BSD, _maybe(self.attention_post_norm, h_BSD))
        h_BSD, record = self._mix_channels(_maybe(self.ffn_norm, x_BSD), mask_BS, jitter)
        return self._add(x_BSD, _maybe(self.ffn_post_norm, h_BSD)), record

    def _mix_channels(
        self, h_BSD: Tensor, mask_BS: Tensor | None, jitter: Jitter | None
    ) -> tuple[Tensor, RoutingRecord | None]:
        if not isinstance(self.ffn, SparseMoE):
            return self.ffn(h_BSD), None
        mask_T = None if mask_BS is None else mask_BS.flatten()
        y_TD, record = self.ffn(h_BSD.flatten(0, 1), mask_T, jitter)
        return y_TD.view_as(h_BSD), record

    def _add(self, x_BSD: Tensor, h_BSD: Tensor) -> Tensor:
        return x_BSD + (h_BSD if self.multiplier == 1 else h_BSD * self.multiplier)


def _maybe(norm: nn.Module | None, x: Tensor) -> Tensor:
    y: Tensor = x if norm is None else norm(x)
    return y
