"""Files of JSON lines -> tokens or signatures: the ways that the benchmark compares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_prep import peers


@dataclass(frozen=True)
class Contender:
    """A way to do it: `run(files, tokenizer, folder, workers)`; `needs` names the packages that it takes."""

    run: Callable[[Sequence[Path], Path, Path, int], None]
    needs: tuple[str, ...] = ()
    is_slow: bool = False


def _turnout(
    files: Sequence[Path], tokenizer: Path, folder: Path, workers: int, *, fast: bool = True, **settings: Any
) -> None:
    """The whole road of a recipe, as `turnout prepare` goes it."""
    from data_prep import staged
    from data_prep.recipe import DataRecipe

    page = {
        "name": "bench",
        "output": str(folder / "data"),
        "sources": [{"type": "jsonl", "paths": [str(path) for path in files]}],
        "tokenizer": {"type": "file", "path": str(tokenizer), "fast": fast},
        "executor": {"workers": workers},
        "part_megabytes": 16,
        **settings,
    }
    staged.prepare(DataRecipe.model_validate(page), staged.Asked())


ENCODE = {
    "turnout prepare, in stages": Contender(_turnout, ("gigatoken",)),
    "turnout prepare, exact copies dropped": Contender(
        partial(_turnout, duplicates={"exact": True}), ("gigatoken",)
    ),
    "raw loop, gigatoken": Contender(peers.raw_fast, ("gigatoken",)),
    "turnout prepare, without gigatoken": Contender(partial(_turnout, fast=False), is_slow=True),
    "raw loop, encode_batch_fast": Contender(peers.raw_reference, (), is_slow=True),
    "Megatron-Core, its writer and a pool": Contender(peers.megatron, ("megatron",), is_slow=True),
    "datasets.map": Contender(peers.datasets_map, ("datasets",), is_slow=True),
    "datatrove, DocumentTokenizer": Contender(peers.datatrove_tokens, ("datatrove", "orjson"), is_slow=True),
}
NEAR = {
    "turnout, marks": Contender(peers.marks, ("rensa",)),
    "datatrove, signatures, words of spaCy (its default)": Contender(
        peers.datatrove_signatures, ("datatrove", "orjson", "spacy"), is_slow=True
    ),
    "datatrove, signatures, our words": Contender(
        peers.datatrove_signatures_fast, ("datatrove", "orjson"), is_slow=True
    ),
}

_COPIES_GO = {"exact": True, "near": {}}
MEMORY = {
    "turnout prepare, in stages": Contender(_turnout),
    "turnout prepare, exact and near copies dropped": Contender(
        partial(_turnout, duplicates=_COPIES_GO), ("rensa",)
    ),
    "turnout prepare, the same of cleaned text": Contender(
        partial(_turnout, clean={"normalise": False}, duplicates=_COPIES_GO), ("rensa",)
    ),
}
