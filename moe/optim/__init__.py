"""Parameters -> groups, an optimizer over them, and a learning rate for every step."""

from moe.optim.groups import FROZEN, fresh_state, make, parameter_groups, states
from moe.optim.matrices import Stack, stacks
from moe.optim.muon import Muon
from moe.optim.schedule import learning_rate

__all__ = [
    "FROZEN",
    "Muon",
    "Stack",
    "fresh_state",
    "learning_rate",
    "make",
    "parameter_groups",
    "stacks",
    "states",
]
