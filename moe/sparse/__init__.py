"""The sparse layer: router -> dispatch -> experts -> combine."""

from moe.sparse.capacity import Capacity
from moe.sparse.dispatch import Dispatcher
from moe.sparse.jitter import Jitter
from moe.sparse.layer import SparseMoE
from moe.sparse.plan import ExpertLayout
from moe.sparse.router import RoutingRecord

__all__ = ["Capacity", "Dispatcher", "ExpertLayout", "Jitter", "RoutingRecord", "SparseMoE"]
