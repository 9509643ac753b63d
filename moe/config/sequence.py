"""What sharing sequences among ranks asks of the rest of a recipe."""

import math

from moe.config.numbers import choice, divisors
from moe.config.run import RunConfig


def sequence_faults(run: RunConfig) -> list[str]:
    """Every contradiction between `parallel.sequence_parallel_size` and the recipe, a line each."""
    size = run.parallel.sequence_parallel_size
    if size == 1:
        return []
    return [*_parts(run, size), *_routing(run, size)]


def sequence_sizes(run: RunConfig) -> list[int]:
    """The sizes that the recipe could have, whatever the number of ranks."""
    heads = math.gcd(run.model.attention.num_heads, run.model.num_kv_heads)
    return divisors(math.gcd(heads, run.data.sequence_length))


def _parts(run: RunConfig, size: int) -> list[str]:
    attention, kv_heads, length = run.model.attention, run.model.num_kv_heads, run.data.sequence_length
    way_out, faults = f"Use {choice(sequence_sizes(run))}", []
    if attention.num_heads % size:
        faults.append(
            f"parallel.sequence_parallel_size is {size}, but model.attention.num_heads is {attention.num_heads}: in "
            f"attention every rank has as many heads. {way_out}."
        )
    elif kv_heads % size:
        faults.append(
            f"parallel.sequence_parallel_size is {size}, but model.attention.num_kv_heads is {kv_heads}: in attention "
            f"every rank has as many key heads, each on one rank only. {way_out}, or a num_kv_heads that is a "
            f"multiple of {size}."
        )
    if length % size:
        faults.append(
            f"parallel.sequence_parallel_size is {size}, but data.sequence_length is {length}: every rank holds as "
            f"many positions. {way_out}, or a data.sequence_length that is a multiple of {size}."
        )
    return faults


def _routing(run: RunConfig, size: int) -> list[str]:
    """What decides among the tokens of a rank would decide otherwise for parts of sequences."""
    moe, faults = run.model.moe, []
    if run.model.prediction_depth:
        faults.append(
            f"model.prediction_depth is {run.model.prediction_depth}, but parallel.sequence_parallel_size is {size}: "
            f"prediction modules need the tokens that follow, and other ranks have some of them. Use "
            f"parallel.sequence_parallel_size=1, or model.prediction_depth=0."
        )
    if run.balance.capacity_factor is not None:
        faults.append(
            f"balance.capacity_factor is {run.balance.capacity_factor}, but parallel.sequence_parallel_size is "
            f"{size}: a capacity counts whole micro-batches, and a rank has only parts of them. Set "
            f"balance.capacity_factor=null, or parallel.sequence_parallel_size=1."
        )
    if moe is not None and moe.router_choice != "token":
        faults.append(
            f"model.moe.router_choice is {moe.router_choice}, but parallel.sequence_parallel_size is {size}: it deals "
            f"with whole micro-batches, and a rank has only parts of them. Use router_choice token, or "
            f"parallel.sequence_parallel_size=1."
        )
    return faults
