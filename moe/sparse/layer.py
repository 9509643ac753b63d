"""The sparse layer: router -> dispatch -> experts -> combine.

T tokens here, D width (or the latent width), K choices.
"""

import torch
from torch import Tensor, nn

from moe.config import MoEConfig
from moe.sparse.activation import GatedUnit
from moe.sparse.capacity import Capacity, accepted
from moe.sparse.dispatch import AllToAll, Dispatcher, Local
from moe.sparse.experts import Experts
from moe.sparse.jitter import Jitter
from moe.sparse.linear import Linear
from moe.sparse.plan import ExpertLayout
from moe.sparse.router import Router, Routing, RoutingRecord
from moe.sparse.spare import Spare
from moe.sparse.swiglu import SwiGLU


class SparseMoE(nn.Module):
    """A feed-forward block of which each token visits K experts (arXiv:2101.03961, arXiv:2401.06066)."""

    def __init__(
        self,
        hidden_size: int,
        config: MoEConfig,
        layout: ExpertLayout,
        capacity: Capacity | None = None,
        recompute: bool = False,
        dispatcher: Dispatcher | None = None,
        spare: Spare | None = None,
    ) -> None:
        """`capacity` limits what an expert accepts while training (None: dropless); `recompute` computes the
        experts' pre-activations again in backward instead of keeping them; `dispatcher` is the way to experts on
        other ranks (None: all-to-all); `spare` is shared by layers (None: its own).
        """
        super().__init__()
        self.layout = layout
        self.capacity = capacity
        self.router = Router(hidden_size, config)
        latent, width = config.latent_size, config.latent_size or hidden_size
        self.to_latent = Linear(hidden_size, latent, bias=False) if latent else None
        self.from_latent = Linear(latent, hidden_size, bias=False) if latent else None
        self.dispatcher: Dispatcher = dispatcher or (AllToAll(layout) if layout.size > 1 else Local(layout))
        self.experts = Experts(
            width,
            config.expert_intermediate_size,
            layout,
            GatedUnit.of(config),
            config.expert_bias,
            recompute,
            spare,
        )
        shared = config.shared_expert_intermediate_size
        self.shared_expert = SwiGLU(hidden_size, shared) if shared else None
        self.shared_expert_gate = Linear(hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(
        self, x_TD: Tensor, token_mask_T: Tensor | None = None, jitter: Jitter | None = None
    ) -> tuple[Tensor, RoutingRecord]:
        """[T, D] -> [T, D]; masked tokens (False) get nothing from routed experts and count nowhere."""
        routing = self.router(x_TD, token_mask_T, jitter)
        sent_TK, num_dropped = self._accept(routing)
        latent_TD = x_TD if self.to_latent is None else self.to_latent(x_TD)
        dispatched = self.dispatcher.dispatch(latent_TD, routing.ids_TK, routing.weights_TK, sent_TK)
        shared_TD = self._shared(x_TD)  # while rows travel
        y_TD = dispatched.combine(self.experts(dispatched.rows()))
        if self.from_latent is not None:
            y_TD = self.from_latent(y_TD)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD, routing.record(num_dropped)

    def _accept(self, routing: Routing) -> tuple[Tensor | None, Tensor]:
        """Which choices travel (None: all), and how many that count do not."""
        none = torch.zeros((), dtype=torch.int64, device=routing.ids_TK.device)
        kept_TK = routing.kept_TK
        if self.capacity is None or not self.training:
            return kept_TK, none
        if kept_TK is None:
            kept_TK = torch.ones_like(routing.ids_TK, dtype=torch.bool)
        num_experts = self.layout.num_experts
        sent_TK = accepted(routing.ids_TK, routing.weights_TK, kept_TK, self.capacity, num_experts)
        return sent_TK, kept_TK.sum() - sent_TK.sum()

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        if self.shared_expert is None:
            return None
        y_TD: Tensor = self.shared_expert(x_TD)
        if self.shared_expert_gate is not None:
            y_TD = torch.sigmoid(self.shared_expert_gate(x_TD)) * y_TD
        return y_TD
