"""The sparse layer: router -> dispatch -> experts -> combine.

T tokens here, R rows at their experts, D width, E experts, K choices.
"""

import torch
from torch import Tensor, nn

from moe.config import MoEConfig
from moe.sparse.capacity import Capacity, accepted
from moe.sparse.dispatch import Dispatcher
from moe.sparse.experts import Experts
from moe.sparse.plan import ExpertLayout, make_plan
from moe.sparse.router import Router, Routing, RoutingRecord
from moe.sparse.swiglu import SwiGLU


class SparseMoE(nn.Module):
    """A feed-forward block of which each token visits K experts (arXiv:2101.03961, arXiv:2401.06066)."""

    def __init__(
        self, hidden_size: int, config: MoEConfig, layout: ExpertLayout, capacity: Capacity | None = None
    ) -> None:
        """`capacity` limits what an expert accepts while training; None: dropless."""
        super().__init__()
        self.layout = layout
        self.capacity = capacity
        self.router = Router(hidden_size, config)
        self.dispatcher = Dispatcher(layout)
        self.experts = Experts(hidden_size, config.expert_intermediate_size, layout)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = SwiGLU(hidden_size, shared) if shared else None
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x_TD: Tensor, token_mask_T: Tensor | None = None) -> tuple[Tensor, RoutingRecord]:
        """[T, D] -> [T, D]; masked tokens (False) get nothing from routed experts and count nowhere."""
        routing = self.router(x_TD, token_mask_T)
        sent_TK, num_dropped = self._accept(routing, token_mask_T)
        plan = make_plan(routing.ids_TK, self.layout, sent_TK)
        rows_RD = self.dispatcher.dispatch(x_TD, plan)
        rows_RD = self.experts(rows_RD, plan.rows_per_local_expert)
        y_TD = self.dispatcher.combine(rows_RD, plan, routing.weights_TK)
        if self.shared_expert is not None:
            y_TD = y_TD + self._shared(x_TD)
        return y_TD, routing.record(num_dropped)

    def _accept(self, routing: Routing, mask_T: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Which choices travel (None: all), and how many unmasked ones do not."""
        none = torch.zeros((), dtype=torch.int64, device=routing.ids_TK.device)
        kept_TK = None if mask_T is None else mask_T.unsqueeze(-1).expand_as(routing.ids_TK)
        if self.capacity is None or not self.training:
            return kept_TK, none
        if kept_TK is None:
            kept_TK = torch.ones_like(routing.ids_TK, dtype=torch.bool)
        num_experts = self.layout.num_experts
        sent_TK = accepted(routing.ids_TK, routing.weights_TK, kept_TK, self.capacity, num_experts)
        return sent_TK, kept_TK.sum() - sent_TK.sum()

    def _shared(self, x_TD: Tensor) -> Tensor:
        assert self.shared_expert is not None
        y_TD: Tensor = self.shared_expert(x_TD)
        if self.shared_expert_gate is not None:
            y_TD = torch.sigmoid(self.shared_expert_gate(x_TD)) * y_TD
        return y_TD
