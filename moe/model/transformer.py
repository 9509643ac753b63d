"""Token ids -> logits, or the summed cross-entropy and every sparse layer's routing.

B sequences, S positions, D width, V vocabulary.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config import ModelConfig
from moe.model.block import Block
from moe.model.head import Head
from moe.model.norm import RMSNorm
from moe.model.rope import rotation
from moe.model.ulysses import SequenceGroup
from moe.sparse import Capacity, Dispatcher, ExpertLayout, Jitter, RoutingRecord
from moe.sparse.router import Router


class ModelOutput(NamedTuple):
    """What a forward pass with labels gives; a tuple, since DeepSpeed's hooks look for tensors in nothing else."""

    cross_entropy: Tensor
    """float32 scalar: nats, summed over unmasked tokens."""
    records: tuple[RoutingRecord, ...]
    """Routing of each sparse layer, bottom to top."""


class Transformer(nn.Module):
    """Embedding, decoder layers, norm, head. Weights are uninitialised: see `moe.model.init.initialize`."""

    def __init__(
        self,
        config: ModelConfig,
        layout: ExpertLayout | None = None,
        recompute: Literal["none", "experts", "block"] = "none",
        capacity: Capacity | None = None,
        dispatcher: Dispatcher | None = None,
        sequence_group: SequenceGroup | None = None,
    ) -> None:
        """`layout` places the experts (default: all here); `recompute` says what backward computes again;
        `capacity` limits experts while training (default: dropless); `dispatcher` is the way to experts on other
        ranks (default: all-to-all); `sequence_group` has the ranks that share sequences (default: nobody does).
        """
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.sequence_group = sequence_group or SequenceGroup()
        layout = layout or ExpertLayout(config.moe.num_experts if config.moe else 1)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, index, layout, capacity, recompute == "experts", dispatcher, self.sequence_group)
            for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Head(config.hidden_size, config.vocab_size)
        if config.tie_embeddings:
            self.embed.weight = self.head.weight

    def forward(
        self,
        input_ids_BS: Tensor,
        labels_BS: Tensor | None = None,
        mask_BS: Tensor | None = None,
        jitter: Jitter | None = None,
    ) -> Tensor | ModelOutput:
        """Logits [B, S, V]; with labels (int64 [B, S], the next tokens), a `ModelOutput` instead.

        Positions whose `mask_BS` (bool) is False add to no loss and no count. `jitter` is the noise of this batch's
        B S tokens for every layer's router. Where ranks share sequences, S is a rank's part of their positions.
        """
        x_BSD = self.embed(input_ids_BS)
        length = input_ids_BS.shape[1] * self.sequence_group.size
        turn = rotation(length, self.config.head_dim, self.config.attention.rope_theta, x_BSD.device)
        records = []
        for index, layer in enumerate(self.layers):
            noise = None if jitter is None else jitter.of_layer(index)
            if self.recompute == "block" and torch.is_grad_enabled():
                x_BSD, record = checkpoint(
                    layer, x_BSD, turn, mask_BS, noise, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BSD, record = layer(x_BSD, turn, mask_BS, noise)
            if record is not None:
                records.append(record)
        h_BSD = self.norm(x_BSD)
        if labels_BS is None:
            logits_BSV: Tensor = self.head(h_BSD)
            return logits_BSV
        return ModelOutput(self.head(h_BSD, labels_BS, mask_BS), tuple(records))

    def selection_biases(self) -> list[Tensor]:
        """The selection bias of each sparse layer, bottom to top: float32 [E], changed in place by balancing."""
        routers = [module for module in self.modules() if isinstance(module, Router)]
        return [router.selection_bias_E for router in routers if router.selection_bias_E is not None]
