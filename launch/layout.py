"""A recipe and another number of ranks -> the overrides under which it trains the same there."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from moe import recipe
from moe.checkpoint.identity import counts_by_micro_batch
from moe.config import RunConfig, check_world
from moe.config.numbers import divisors
from moe.errors import ConfigError


def refit(path: Path, world_size: int, overrides: Sequence[str] = ()) -> tuple[str, ...] | None:
    """What to change of the recipe at `path` for `world_size` ranks; () if nothing; None if nothing helps.

    The batch stays; gradient accumulation follows. Groups that share experts or sequences get smaller, never larger
    than in the recipe, and a micro-batch as well, unless its size is part of what is trained. The nearest that fits
    is chosen. Raises `ConfigError` for a recipe that is wrong by itself.
    """
    run = recipe.load(RunConfig, path, overrides)
    for changes in _changes(run):
        try:
            check_world(recipe.load(RunConfig, path, [*overrides, *changes]), world_size)
        except ConfigError:
            continue
        return changes
    return None


def _changes(run: RunConfig) -> Iterator[tuple[str, ...]]:
    """From none to many."""
    train, parallel = run.train, run.parallel
    micro = [train.micro_batch_size] if counts_by_micro_batch(run) else _down(train.micro_batch_size)
    for sharing in _down(parallel.sequence_parallel_size):
        for experts in _down(parallel.expert_parallel_size):
            for size in micro:
                wanted = {
                    "parallel.sequence_parallel_size": (parallel.sequence_parallel_size, sharing),
                    "parallel.expert_parallel_size": (parallel.expert_parallel_size, experts),
                    "train.micro_batch_size": (train.micro_batch_size, size),
                }
                yield tuple(f"{key}={new}" for key, (old, new) in wanted.items() if new != old)


def _down(size: int) -> list[int]:
    """Its divisors, itself first."""
    return sorted(divisors(size), reverse=True)
