"""The installed Python -> its own library's sources and documentation topics, as documents.

One document a .py file, in the order of their paths, then one a topic of `help()`. Folders of tests are left out,
since not every distribution ships them, and installed packages, since they differ from machine to machine.
"""

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from data_prep.documents import Document, Dropped, Source, from_text

_LEFT_OUT = {"__pycache__", "dist-packages", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
_UNREADABLE = "not decodable as Python"


def stdlib() -> Source:
    """The same documents in the same order for one installation of Python."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = tuple(_modules(root))
    topics = [root / "pydoc_data" / "topics.py"]
    return Source(
        "stdlib", (*modules, *(path for path in topics if path.is_file())), lambda: _documents(modules)
    )


def _modules(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _LEFT_OUT)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _documents(modules: tuple[Path, ...]) -> Iterator[Document | Dropped]:
    for path in modules:
        try:
            with tokenize.open(path) as file:  # honours the file's own coding line
                yield from_text(file.read())
        except (SyntaxError, UnicodeDecodeError, OSError):
            yield Dropped(_UNREADABLE, path.stat().st_size if path.exists() else 0)
    for _, text in sorted(_topics().items()):
        yield from_text(text)


def _topics() -> dict[str, str]:
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        return {}
    return topics
