"""Raw bytes or text -> a document, or the reason why there is none."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from moe.data.shards import Amount, FileStamp, SourceFacts
from moe.errors import DataError

EMPTY = "empty"
NOT_UTF8 = "invalid UTF-8"
NULL = "null"


@dataclass(frozen=True)
class Document:
    """A text that will be trained on; num_bytes is its length in UTF-8."""

    text: str
    num_bytes: int
    url: str = ""
    """Where it was found, if the source tells."""


@dataclass(frozen=True)
class Dropped:
    """A text that will not be, and why."""

    reason: str
    num_bytes: int
    where: str = ""
    """File and line, where a row could not be read."""
    sample: str = ""
    """The beginning of that row."""


@dataclass(frozen=True)
class Source:
    """One source of a recipe: `items` reads it anew at every call; `files` are what it reads, if files."""

    name: str
    files: tuple[Path, ...]
    items: Callable[[], Iterator[Document | Dropped]]

    def stamps(self) -> dict[str, FileStamp]:
        """Of each of `files`."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # reading and hashing let go of the interpreter
            return dict(zip(map(str, self.files), threads.map(FileStamp.of, self.files), strict=True))

    def times(self) -> dict[str, tuple[int, int]]:
        """Size, and time of the last change in nanoseconds, of each of `files`; ask before `stamps`."""
        found = {str(path): path.stat() for path in self.files}
        return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}

    def check_unchanged(self, times: Mapping[str, tuple[int, int]], stamps: Mapping[str, FileStamp]) -> None:
        """Raises `DataError` for a file that is no longer what it was when `times` and `stamps` were asked for."""
        for name, now in self.times().items():
            if now != times[name] and not FileStamp.of(Path(name)).matches(stamps[name]):
                raise DataError(
                    f"{name}: this file was changed while it was read, so what was made of it is worth nothing. "
                    f"Leave it alone, and run the same command again with --overwrite."
                )

    def digest(self, stamps: Mapping[str, FileStamp] | None = None) -> str | None:
        """Hash of the names and contents of `files`; null where there are none to hash."""
        if not self.files:
            return None
        digest = xxhash.xxh3_128()
        for path, stamp in (self.stamps() if stamps is None else stamps).items():
            digest.update(f"{path}\0{stamp.xxh3_128}\0".encode())
        return digest.hexdigest()


@dataclass
class Account:
    """What was read from one source, and what became of it."""

    read: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    rewritten: int = 0
    """Bytes that cleaning added, or took away if negative."""
    tokens: int | None = None
    """Of what was kept; null where it is not encoded yet."""

    def reads(self, item: Document | Dropped) -> None:
        _add(self.read, item.num_bytes)
        if isinstance(item, Dropped):
            _add(self.dropped.setdefault(item.reason, Counter()), item.num_bytes)

    def keeps(self, document: Document) -> None:
        _add(self.kept, document.num_bytes)

    def drops(self, document: Document, reason: str) -> None:
        """A document that was read as one, but cannot be trained on."""
        _add(self.dropped.setdefault(reason, Counter()), document.num_bytes)

    def close(self, source: str, digest: str | None) -> SourceFacts:
        """The account for the manifest, balanced to the byte."""
        fates = [self.kept, *self.dropped.values()]
        documents, size = (sum(fate[unit] for fate in fates) for unit in ("documents", "bytes"))
        assert (self.read["documents"], self.read["bytes"] + self.rewritten) == (documents, size)
        return SourceFacts(
            source=source,
            digest=digest,
            read=_amount(self.read),
            kept=_amount(self.kept),
            dropped={reason: _amount(count) for reason, count in sorted(self.dropped.items())},
            rewritten=self.rewritten,
            tokens=self.tokens,
        )


def add(accounts: Iterable[SourceFacts], source: str, digest: str | None) -> SourceFacts:
    """The sum of accounts of one source."""
    total = Account()
    for account in accounts:
        total.rewritten += account.rewritten
        total.read.update(account.read.model_dump())
        total.kept.update(account.kept.model_dump())
        for reason, amount in account.dropped.items():
            total.dropped.setdefault(reason, Counter()).update(amount.model_dump())
    return total.close(source, digest)


def nothing_left(accounts: Iterable[SourceFacts]) -> DataError:
    """The error for sources of which no document was kept."""
    read, dropped = 0, Counter[str]()
    for account in accounts:
        read += account.read.documents
        dropped.update({why: amount.documents for why, amount in account.dropped.items()})
    reasons = ", ".join(f"{count} {why}" for why, count in sorted(dropped.items()))
    return DataError(
        f"the sources hold no usable text: {read} documents read, none kept "
        f"({f'dropped: {reasons}' if reasons else 'there are none in them'}). "
        f"Give sources with text in UTF-8; their paths and text_field say what is read."
    )


def from_bytes(raw: bytes, url: str = "") -> Document | Dropped:
    """UTF-8 text, or dropped: invalid UTF-8, or nothing but white space."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return Dropped(NOT_UTF8, len(raw))
    return _if_not_blank(text, len(raw), url)


def from_text(text: str | None, url: str = "") -> Document | Dropped:
    """As `from_bytes`; a string that UTF-8 cannot hold (half of a surrogate pair) is invalid too."""
    if text is None:
        return Dropped(NULL, 0)
    try:
        num_bytes = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return Dropped(NOT_UTF8, len(text.encode("utf-8", "surrogatepass")))
    return _if_not_blank(text, num_bytes, url)


def _if_not_blank(text: str, num_bytes: int, url: str) -> Document | Dropped:
    return Document(text, num_bytes, url) if text and not text.isspace() else Dropped(EMPTY, num_bytes)


def _add(counter: Counter[str], num_bytes: int) -> None:
    counter["documents"] += 1
    counter["bytes"] += num_bytes


def _amount(counter: Counter[str]) -> Amount:
    return Amount(documents=counter["documents"], bytes=counter["bytes"])
