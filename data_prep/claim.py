"""All that decides what stages make -> a page in their folder, by which later runs know whose it is."""

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_prep import given
from data_prep.recipe import DataRecipe
from moe.data.shards import FileStamp
from moe.errors import DataError

_NAME = "stages.json"
_DECIDING = ("datatrove", "ftfy", "numpy", "pyarrow", "rensa", "tokenizers")
_DECIDING_OF_PAGES = ("trafilatura",)


def page(recipe: DataRecipe, digests: Sequence[str | None], tokenizer: Sequence[Path]) -> dict[str, Any]:
    """`digests` are those of the sources, `tokenizer` the files of one made before."""
    deciding = _DECIDING + (_DECIDING_OF_PAGES if recipe.reads_html else ())
    return {
        "recipe": recipe.identity,
        "sources": digests,
        "tokenizer": {path.name: FileStamp.of(path).xxh3_128 for path in tokenizer},
        "given": given.digests(recipe),
        "versions": {name: _version(name) for name in deciding},
    }


def claim(work: Path, page: dict[str, Any], *, overwrite: bool, look: bool) -> bool:
    """Make the folder ours, or find that it is; whether what is in it goes for that. `look` alone changes nothing.

    Raises `DataError` where another recipe's results are in it, and no `overwrite`.
    """
    path = work / _NAME
    if work.exists() and any(work.iterdir()) and not path.is_file():
        raise DataError(
            f"{work}: stages go here, but turnout did not make what is there. Use another output."
        )
    goes = False
    if path.is_file():
        changed = _changed(path, page)
        if not changed:
            return False
        goes = _holds_results(work)
        if goes and not overwrite:
            raise DataError(
                f"{work}: stages of another recipe, text or library are there ({', '.join(changed)} changed). "
                f"Use another output, or --overwrite to begin anew."
            )
    if not look:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        unfinished = path.with_name(f".{_NAME}.unfinished")
        unfinished.write_text(json.dumps(page, indent=2), encoding="utf-8")
        unfinished.rename(path)
    return goes


def _changed(path: Path, page: dict[str, Any]) -> list[str]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:  # a power cut tears it, and then nothing says what the rest was made from
        found = {}
    known = found if isinstance(found, dict) else {}
    return [name for name, value in page.items() if known.get(name) != value]


def _holds_results(work: Path) -> bool:
    """Whether anything came of it: a recipe that failed at once, and is mended, need not be told to overwrite."""
    return any(not path.name.endswith(".unfinished") for path in work.glob("*/*"))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
