"""A decoder layer: mix tokens, then mix channels, each behind a norm and around a residual.

B sequences, S positions, D width.
"""

from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.attention import Attention
from moe.model.norm import RMSNorm
from moe.model.rope import Rotation
from moe.model.ulysses import SequenceGroup
from moe.sparse import Capacity, Dispatcher, ExpertLayout, Jitter, RoutingRecord, SparseMoE
from moe.sparse.swiglu import SwiGLU


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); the ffn is dense or sparse."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        layout: ExpertLayout,
        capacity: Capacity | None = None,
        recompute_experts: bool = False,
        dispatcher: Dispatcher | None = None,
        sequence_group: SequenceGroup | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, sequence_group)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn: SparseMoE | SwiGLU
        if config.moe is not None and index in config.sparse_layers:
            self.ffn = SparseMoE(
                config.hidden_size, config.moe, layout, capacity, recompute_experts, dispatcher
            )
        else:
            assert config.intermediate_size is not None, "checked by moe.config.rules"
            self.ffn = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, mask_BS: Tensor | None = None, jitter: Jitter | None = None
    ) -> tuple[Tensor, RoutingRecord | None]:
        """[B, S, D] -> [B, S, D] and, from a sparse layer, its routing."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotation)
        h_BSD = self.ffn_norm(x_BSD)
        if not isinstance(self.ffn, SparseMoE):
            return x_BSD + self.ffn(h_BSD), None
        mask_T = None if mask_BS is None else mask_BS.flatten()
        y_TD, record = self.ffn(h_BSD.flatten(0, 1), mask_T, jitter)
        return x_BSD + y_TD.view_as(x_BSD), record
