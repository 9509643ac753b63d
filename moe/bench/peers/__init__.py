"""The same layer by others, on the same weights; each says its version and gives back comparable gradients."""

from collections.abc import Sequence

from moe.bench.peers import deepspeed, hf
from moe.bench.peers.contender import Contender, Entry, Unavailable
from moe.bench.peers.limit import Dense, DenseBlock
from moe.bench.peers.megatron import Megatron
from moe.bench.peers.olmo import OLMo
from moe.bench.peers.ours import Ours
from moe.bench.peers.torchtitan import TorchTitan
from moe.errors import ConfigError

__all__ = ["ENTRIES", "LIMIT", "OURS", "Contender", "Entry", "Unavailable", "select"]

LIMIT = Entry("dense limit", "torch", Dense)
OURS = Entry("turnout", "turnout", Ours)

ENTRIES = (
    LIMIT,
    OURS,
    Entry("turnout, dense", "turnout", DenseBlock),
    Entry("HF grouped_mm", "transformers", lambda problem: hf.HuggingFace(problem, "grouped_mm")),
    Entry("HF batched_mm", "transformers", hf.batched_mm),
    Entry("HF eager", "transformers", lambda problem: hf.HuggingFace(problem, "eager")),
    Entry("DeepSpeed grouped_mm", "deepspeed", lambda problem: deepspeed.Experts(problem, grouped=True)),
    Entry("DeepSpeed loop", "deepspeed", lambda problem: deepspeed.Experts(problem, grouped=False)),
    Entry("DeepSpeed AutoEP", "deepspeed", deepspeed.AutoEP, forced=False),
    Entry("Megatron-Core sequential", "megatron-core", Megatron),
    Entry("torchtitan", "torchtitan", TorchTitan),
    Entry("OLMo-core dropless", "ai2-olmo-core", OLMo),
)


def select(only: Sequence[str], skip: Sequence[str]) -> tuple[Entry, ...]:
    """The entries that `only`, or else `skip`, leaves: parts of names, whatever their case; the limit always.

    Raises `ConfigError`: both given, or a part that is in no name.
    """
    if only and skip:
        raise ConfigError("--only and --skip are both given: one of them says it all. Leave out the other.")
    for option, part in [*(("--only", part) for part in only), *(("--skip", part) for part in skip)]:
        if not any(_has(entry, [part]) for entry in ENTRIES):
            names = ", ".join(repr(entry.name) for entry in ENTRIES)
            raise ConfigError(f"{option} is {part!r}, which is no part of a name. The names are {names}.")
    return tuple(
        entry for entry in ENTRIES if entry is LIMIT or (_has(entry, only) if only else not _has(entry, skip))
    )


def _has(entry: Entry, parts: Sequence[str]) -> bool:
    return any(part.lower() in entry.name.lower() for part in parts)
