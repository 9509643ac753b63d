"""Files that a recipe names beside its sources -> their hashes: test sets, lists of addresses, a model of languages."""

from pathlib import Path

from data_prep.paths import matches
from data_prep.recipe import DataRecipe
from data_prep.treatment import Clean
from moe.data.shards import FileStamp


def digests(recipe: DataRecipe) -> dict[str, str]:
    """By path. Raises `DataError` for a pattern that nothing matches."""
    tests = matches(recipe.decontaminate.paths) if recipe.decontaminate else ()
    return _hashed((*_of_clean(recipe.clean), *tests))


def _of_clean(clean: Clean | None) -> tuple[Path, ...]:
    if clean is None:
        return ()
    model = Path(clean.language.model) if clean.language else None
    patterns = [*clean.urls.block, *clean.urls.words] if clean.urls else []
    return (*matches(patterns), *([model] if model and model.is_file() else []))


def _hashed(paths: tuple[Path, ...]) -> dict[str, str]:
    return {str(path): FileStamp.of(path).xxh3_128 for path in paths}
