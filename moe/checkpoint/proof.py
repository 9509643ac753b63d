"""A restored engine's state beside the checkpoint that it came from: equal by hash, expert by expert."""

from moe import log
from moe.checkpoint import state as states
from moe.checkpoint.folder import Layout, Manifest
from moe.checkpoint.keys import Key
from moe.checkpoint.tensors import hash_of
from moe.engine.engine import Engine
from moe.errors import CheckpointError


def prove(engine: Engine, manifest: Manifest) -> None:
    """If another layout wrote the checkpoint, read the whole state back and compare all hashes. Collective.

    Raises `CheckpointError` on all ranks, naming the first tensor that differs or that no rank holds.
    """
    ranks, here = engine.ranks, Layout.of(engine.run, engine.ranks.world_size)
    # What belongs to no parameter, no layout changes.
    said = {key: saved.xxh3 for key, saved in manifest.tensors.items() if Key.parse(key).parameter}
    if manifest.layout == here:
        return ranks.barrier()
    if None in said.values():
        if ranks.speaks:
            log.get().warning(
                "step %d was written by version 1 of the format, without hashes of tensors: what came of it on %s "
                "cannot be compared",
                manifest.step,
                here,
            )
        return ranks.barrier()
    mine = {key: hash_of(tensor.cpu()) for key, tensor in states.collect(engine)}
    found = {key: xxh3 for part in ranks.gather(mine) for key, xxh3 in part.items()}
    differing = [key for key in sorted(said.keys() | found.keys()) if said.get(key) != found.get(key)]
    if differing:
        raise CheckpointError(
            f"step {manifest.step}, written by {manifest.layout}, was read on {here}, but {len(differing)} of "
            f"{len(said)} tensors are not what they were, {differing[0]} first: training on would be other training. "
            f"Go on in the layout that wrote it."
        )
    if ranks.speaks:
        log.get().info("resized from %s to %s: %d tensors equal by hash", manifest.layout, here, len(said))
    return None
