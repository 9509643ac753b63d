"""Parameters -> decay groups, AdamW, and a learning rate for every step."""

from moe.optim.adamw import adamw, parameter_groups
from moe.optim.schedule import learning_rate

__all__ = ["adamw", "learning_rate", "parameter_groups"]
