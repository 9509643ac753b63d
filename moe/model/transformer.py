"""Token ids -> logits, or the summed cross-entropy and every sparse layer's routing.

B sequences, S positions, D width, V vocabulary.
"""

from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config import ModelConfig
from moe.model.block import Block
from moe.model.documents import Documents
from moe.model.head import Head
from moe.model.norm import norm
from moe.model.prediction import Prediction, following
from moe.model.rope import Rotation, rotation
from moe.model.ulysses import SequenceGroup
from moe.sparse import Capacity, Dispatcher, ExpertLayout, Jitter, RoutingRecord
from moe.sparse.router import Router
from moe.sparse.spare import Spare


class ModelOutput(NamedTuple):
    """What a forward pass with labels gives; a tuple, since DeepSpeed's hooks look for tensors in nothing else."""

    cross_entropy: Tensor
    """float32 scalar: nats, summed over unmasked tokens."""
    records: tuple[RoutingRecord, ...]
    """Routing of each sparse layer, bottom to top, those of prediction modules last."""
    further: Tensor | None = None
    """float32 scalar: nats of the prediction modules, summed over tokens, the mean over modules; None outside training
    and without them."""


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
        block = partial(
            Block,
            layout=layout,
            capacity=capacity,
            recompute_experts=recompute == "experts",
            dispatcher=dispatcher,
            sequence_group=self.sequence_group,
            spare=Spare(),
        )
        blocks = [block(config, index) for index in range(config.num_blocks)]
        self.layers = nn.ModuleList(blocks[: config.num_layers])
        self.norm = norm(config)
        self.predictions = nn.ModuleList(Prediction(config, block) for block in blocks[config.num_layers :])
        self.head = Head(config.hidden_size, config.vocab_size, config.head_bias, config.logit_divisor)
        if config.tie_embeddings:
            self.embed.weight = self.head.weight

    def forward(
        self,
        input_ids_BS: Tensor,
        labels_BS: Tensor | None = None,
        mask_BS: Tensor | None = None,
        jitter: Jitter | None = None,
        documents_BS: Tensor | None = None,
    ) -> Tensor | ModelOutput:
        """Logits [B, S, V]; with labels (int64 [B, S], the next tokens), a `ModelOutput` instead.

        Positions whose `mask_BS` (bool) is False add to no loss and no count. `jitter` is the noise of this batch's
        B S tokens for every layer's router. Where ranks share sequences, S is a rank's part of their positions.

        `documents_BS` (integers, best on the CPU) says which document of its row each token belongs to: attention stays
        inside, positions begin again, and the outcome is that of each document on its own. It has the positions of all
        ranks that share the sequence. None: rows are one document each.
        """
        documents = None if documents_BS is None else Documents.of(documents_BS, input_ids_BS.device)
        turn = self._rotation(input_ids_BS)
        if documents is not None:
            turn = turn.at(documents.positions_BS)
        x_BSD, records = self._embed(input_ids_BS), []
        for index, layer in enumerate(self.layers):
            x_BSD, record = self._run(
                layer, jitter and jitter.of_layer(index), documents, x_BSD, turn, mask_BS
            )
            records.append(record)
        h_BSD = self.norm(x_BSD)
        if labels_BS is None:
            logits_BSV: Tensor = self.head(h_BSD)
            return logits_BSV
        cross_entropy, further = self.head(h_BSD, labels_BS, mask_BS), None
        if self.training and len(self.predictions):
            # Labels are the tokens that follow, where they are predicted; elsewhere the input has them.
            next_BS = torch.where(labels_BS < 0, following(input_ids_BS, documents), labels_BS)
            next_BS = next_BS if mask_BS is None else next_BS * mask_BS
            further, more = self._foretell(h_BSD, turn, next_BS, labels_BS, mask_BS, jitter, documents)
            records += more
        return ModelOutput(cross_entropy, tuple(r for r in records if r is not None), further)

    def _foretell(
        self,
        h_BSD: Tensor,
        turn: Rotation,
        next_BS: Tensor,
        labels_BS: Tensor,
        mask_BS: Tensor | None,
        jitter: Jitter | None,
        documents: Documents | None,
    ) -> tuple[Tensor, list[RoutingRecord | None]]:
        """Nats of the prediction modules, and routing. A document's last tokens foretell nothing, but are routed."""
        kept_BS = torch.ones_like(labels_BS, dtype=torch.bool) if mask_BS is None else mask_BS
        nats, records = torch.zeros((), device=h_BSD.device), []
        for depth, module in enumerate(self.predictions):
            next_BSD = self._embed(next_BS)
            noise = jitter and jitter.of_layer(self.config.num_layers + depth)
            h_BSD, record = self._run(module, noise, documents, h_BSD, next_BSD, turn, mask_BS)
            next_BS, labels_BS = following(next_BS, documents), following(labels_BS, documents)
            kept_BS = kept_BS & following(kept_BS, documents)
            nats = nats + self.head(h_BSD, labels_BS, kept_BS)
            records.append(record)
        return nats / len(self.predictions), records

    def _run(
        self,
        part: nn.Module,
        noise: Jitter | None,
        documents: Documents | None,
        *inputs: Tensor | Rotation | None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """A layer's or prediction module's output and routing, recomputed in backward if so configured."""
        result: tuple[Tensor, RoutingRecord | None]
        if self.recompute == "block" and torch.is_grad_enabled():
            result = checkpoint(
                part, *inputs, noise, documents, use_reentrant=False, preserve_rng_state=False
            )
        else:
            result = part(*inputs, noise, documents)
        return result

    def _embed(self, ids_BS: Tensor) -> Tensor:
        x_BSD: Tensor = self.embed(ids_BS)
        return x_BSD if self.config.embedding_multiplier == 1 else x_BSD * self.config.embedding_multiplier

    def _rotation(self, ids_BS: Tensor) -> Rotation:
        attention, length = self.config.attention, ids_BS.shape[1] * self.sequence_group.size
        width, scaling = self.config.rotary_dim, attention.rope_scaling
        return rotation(length, width, attention.rope_theta, ids_BS.device, scaling)

    def selection_biases(self) -> list[Tensor]:
        """The selection bias of each sparse layer, bottom to top: float32 [E], changed in place by balancing."""
        routers = [module for module in self.modules() if isinstance(module, Router)]
        return [router.selection_bias_E for router in routers if router.selection_bias_E is not None]
