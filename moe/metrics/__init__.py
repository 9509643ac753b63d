"""Results of steps -> numbers on the screen, in metrics.jsonl and, by option, in TensorBoard."""

from moe.metrics.meter import Meter
from moe.metrics.tracker import Tracker

__all__ = ["Meter", "Tracker"]
