"""All that decides what stages make -> a page in their folder, by which later runs know that it is theirs."""

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_prep.files import matches
from data_prep.recipe import DataRecipe
from moe.data.shards import FileStamp
from moe.errors import DataError

_CLAIM = "stages.json"
_DECIDING = ("datatrove", "ftfy", "numpy", "pyarrow", "rensa", "tokenizers")


def page(recipe: DataRecipe, digests: Sequence[str | None], tokenizer: Sequence[Path]) -> dict[str, Any]:
    """`digests` are those of the sources, `tokenizer` the files of one made before."""
    return {
        "recipe": recipe.identity,
        "sources": digests,
        "tokenizer": {path.name: FileStamp.of(path).xxh3_128 for path in tokenizer},
        "tests": _tests(recipe),
        "versions": {name: _version(name) for name in _DECIDING},
    }


def take(work: Path, page: dict[str, Any], *, overwrite: bool, dry_run: bool) -> None:
    """Make the folder of stages ours, or find that it is; raises `DataError` if another recipe's results are there."""
    path = work / _CLAIM
    if work.exists() and any(work.iterdir()) and not path.is_file():
        raise DataError(
            f"{work}: stages go here, but turnout did not make what is there. Use another output."
        )
    if path.is_file():
        found = json.loads(path.read_bytes())
        changed = [name for name, value in page.items() if found.get(name) != value]
        if not changed:
            return
        if not overwrite:
            raise DataError(
                f"{work}: stages of another recipe, text or library are there ({', '.join(changed)} changed). "
                f"Use another output, or --overwrite to begin anew."
            )
        if dry_run:
            return
        shutil.rmtree(work)
    if not dry_run:
        work.mkdir(exist_ok=True)
        unfinished = path.with_name(f".{_CLAIM}.unfinished")
        unfinished.write_text(json.dumps(page, indent=2), encoding="utf-8")
        unfinished.rename(path)


def _tests(recipe: DataRecipe) -> list[str]:
    if recipe.decontaminate is None:
        return []
    return [FileStamp.of(path).xxh3_128 for path in matches(recipe.decontaminate.paths)]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
