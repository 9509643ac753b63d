"""Addresses -> the reason why what was found there is dropped: by domain, by page, by words.

As FineWeb's filter does, which datatrove has, but without what that takes from the network, and in any case of letters.
"""

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import xxhash

from data_prep import files
from data_prep.paths import matches
from data_prep.treatment import UrlFilter
from moe.errors import DataError

PLACE, WORD, PART, SUSPECT = (
    "address: blocked",
    "address: word",
    "address: part of a word",
    "address: two words",
)

_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://")
_BETWEEN = re.compile(r"[\W_]+")
_LEAST_SUSPECT = 2
_ARCHIVE = "url_filterblacklistsv0_3_0.tar.gz"


@dataclass(frozen=True)
class Lists:
    """What is blocked: domains and pages by their hashes, sorted `[P]`; words, all in lower case."""

    places_P: npt.NDArray[np.uint64]
    words: frozenset[str] = frozenset()
    parts: frozenset[str] = frozenset()
    """Words that must not stand within others either, whatever signs are between their letters."""
    suspect: frozenset[str] = frozenset()
    """Words of which two make an address one that is blocked."""


def refuser(config: UrlFilter) -> Callable[[str], str | None]:
    """Address to the reason why it is refused, or None. Raises `DataError`: a list that is not there, or empty."""
    ours = Lists(
        _hashes(map(str.encode, _entries(config.block, "block"))), frozenset(_entries(config.words, "words"))
    )
    every = [ours, _fineweb()] if config.fineweb else [ours]
    words = frozenset[str]().union(*(lists.words for lists in every))
    suspect = frozenset[str]().union(*(lists.suspect for lists in every))
    parts = sorted(frozenset[str]().union(*(lists.parts for lists in every)))
    part = re.compile("|".join(map(re.escape, parts))) if parts else None

    def refuse(url: str) -> str | None:
        if not url:
            return None
        url = url.strip().lower()
        if any(_is_in(lists.places_P, places(url)) for lists in every):
            return PLACE
        found = set(_BETWEEN.split(url))
        if not words.isdisjoint(found):
            return WORD
        if len(suspect & found) >= _LEAST_SUSPECT:
            return SUSPECT
        return PART if part is not None and part.search(_BETWEEN.sub("", url)) else None

    return refuse


def places(url: str) -> list[str]:
    """What a list may call an address in lower case: the page, its host and each domain that this is below."""
    bare = _SCHEME.sub("", url)
    try:
        host = (urlsplit(f"//{bare}").hostname or "").rstrip(".")
    except ValueError:  # brackets without an end
        host = ""
    labels = host.split(".")
    return [bare.removeprefix("www.").rstrip("/"), *(".".join(labels[at:]) for at in range(len(labels)))]


def _entry(line: str) -> str:
    """A line of a list, as `places` writes it."""
    bare = _SCHEME.sub("", line.strip().lower()).rstrip("/")
    return bare.removeprefix("www.") if "/" in bare else bare.rstrip(".")


def _entries(patterns: list[str], setting: str) -> list[str]:
    if not patterns:
        return []
    lines = (line for path in matches(patterns) for line in files.whole(path).splitlines())
    read = _entry if setting == "block" else lambda line: line.strip().lower()
    found = [read(line) for line in _without_notes(lines)]
    if not found:
        raise DataError(
            f"clean.urls.{setting} is {', '.join(patterns)}: there is no entry in it, so nothing would be dropped. "
            f"Write one a line, or leave it out."
        )
    if setting == "words" and (strange := [word for word in found if _BETWEEN.search(word)]):
        raise DataError(
            f"clean.urls.words: {strange[0]!r} can never stand between other signs, since it has some itself. Write "
            f"one word of letters and digits a line; domains and pages go into clean.urls.block."
        )
    return found


def _without_notes(lines: Iterable[str]) -> Iterator[str]:
    return (line for line in lines if line.strip() and not line.startswith("#"))


def _hashes(entries: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    return np.sort(np.fromiter(map(xxhash.xxh3_64_intdigest, entries), np.uint64))


def _is_in(places_P: npt.NDArray[np.uint64], names: list[str]) -> bool:
    if not len(places_P):
        return False
    found = np.array([xxhash.xxh3_64_intdigest(name.encode(errors="replace")) for name in names], np.uint64)
    at = np.minimum(np.searchsorted(places_P, found), len(places_P) - 1)
    return bool((places_P[at] == found).any())


@cache  # some seconds, for each process once
def _fineweb() -> Lists:
    """The lists that lie beside datatrove's code."""
    try:
        import datatrove
    except ImportError:
        raise DataError(
            "clean.urls.fineweb needs the lists of datatrove, which is not installed: pip install 'turnout[data]', or "
            "leave it out."
        ) from None
    home = Path(datatrove.__file__).parent / "assets"
    banned, parts, suspect = (
        frozenset(
            _BETWEEN.sub("", line.lower())
            for line in _without_notes((home / f"{name}.txt").read_text(encoding="utf-8").splitlines())
        )
        for name in ("banned_words", "banned_subwords", "soft_banned_words")
    )
    return Lists(_hashes(_archived(home / _ARCHIVE)), banned, parts, suspect)


def _archived(path: Path) -> Iterator[bytes]:
    """Domains as they are, in lower case already, since there are millions of them; then pages."""
    with tarfile.open(path) as archive:
        if (domains := archive.extractfile("domains")) is not None:
            yield from map(bytes.strip, domains)
        if (pages := archive.extractfile("urls")) is not None:
            for line in pages:
                yield _entry(line.decode(errors="replace")).encode()
