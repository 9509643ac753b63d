"""Patterns of a recipe -> the files that they name, each once."""

import glob
import os
from pathlib import Path

from moe.errors import DataError


def matches(patterns: list[str]) -> tuple[Path, ...]:
    """Sorted by path; of paths that lead to the same file by links the shortest, so that no text is read twice.

    Raises `DataError` for a pattern that no file matches, and for what cannot be read as one: a pipe, a link that
    leads nowhere, a name that no manifest could hold.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        names = glob.glob(pattern, recursive=True)  # noqa: PTH207  absolute patterns too
        if not names and os.path.lexists(pattern):
            names = [pattern]  # a file whose name has the signs of a pattern
        # Resolved by us: the system gives up after 40 links, which ** finds where one leads back.
        ways = [(name, real) for name in names if _is_file(name, real := os.path.realpath(name))]
        if not ways:
            what = "only folders match" if names else "no such file, and nothing matches"
            raise DataError(
                f"{pattern}: {what}. Mend the path (it starts from {Path.cwd()}), or use a pattern such as "
                f"folder/*.jsonl."
            )
        for name, real in ways:
            found[real] = min(found.get(real, name), name, key=lambda path: (len(path), path))
    return tuple(sorted(map(Path, found.values())))


def _is_file(name: str, real: str) -> bool:
    """Whether it is one, no folder."""
    if os.path.isfile(real):  # noqa: PTH113  unlike Path's, it never raises
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{name!a}: the name of this file is not UTF-8. Give it another.") from None
        return True
    if os.path.isdir(real):  # noqa: PTH112
        return False
    if os.path.lexists(real) and not os.path.islink(real):  # noqa: PTH114
        raise DataError(
            f"{name}: this is no file but a pipe or a device, and text is read more than once. Write it to a file."
        )
    raise DataError(f"{name}: this link leads to {real}, where nothing is. Remove or mend it.")
