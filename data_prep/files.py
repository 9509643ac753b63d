"""Text, JSON lines and parquet files, plain or compressed -> documents."""

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from data_prep.chat import conversation
from data_prep.documents import Document, Dropped, Source, from_bytes, from_text
from data_prep.paths import matches
from data_prep.recipe import ChatSource, JsonlSource, ParquetSource, TextSource
from moe.errors import DataError

_CHUNK = 1 << 20
_ROWS = 256
_SAMPLE = 200
_OTHER_KINDS = {
    b"\x1f\x8b": "compressed by gzip, so its name should end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd, so its name should end in .zst",
    b"\xfd7zXZ": "compressed by xz, which is not read: unpack it",
    b"\xff\xfe": "UTF-16, which is not read: convert it to UTF-8",
    b"\xfe\xff": "UTF-16, which is not read: convert it to UTF-8",
}
"""First bytes that no line of JSON begins with."""


class _BadRowError(DataError):
    """A line that holds no document, and why in three words."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def text(config: TextSource) -> Source:
    """A file is a document, or `separator` stands between two; a byte order mark before the first is passed over."""
    return _source("text", config.paths, partial(_texts, separator=config.separator))


def jsonl(config: JsonlSource, *, tolerant: bool = False) -> Source:
    """A line is a document; blank lines are none, and a byte order mark before the first one is passed over.

    With `tolerant`, a line that cannot be read as one is dropped, with where it was and how it begins.
    """
    return _source("jsonl", config.paths, partial(_lines, config=config, tolerant=tolerant))


def parquet(config: ParquetSource) -> Source:
    """A row is a document."""
    return _source("parquet", config.paths, partial(_rows, config=config))


def chat(config: ChatSource) -> Source:
    """A line is a conversation, its text the messages as JSON."""
    return _source("chat", config.paths, partial(_conversations, field=config.messages_field))


def objects(path: Path) -> Iterator[Any]:
    """What the lines of JSON in a file say; raises `DataError` for a line that is none."""
    for where, item in _documents_in(path):
        if isinstance(item, Document):
            try:
                yield json.loads(item.text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: this line is not JSON ({error}). Mend or remove it.") from None


def whole(path: Path) -> str:
    """The text of a file; raises `DataError` if it is not UTF-8."""
    try:
        return b"".join(chunks(path)).decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: this is not UTF-8 ({error.reason} at byte {error.start}). Convert it."
        ) from None


def _source(kind: str, patterns: list[str], read: Any) -> Source:
    files = matches(patterns)
    return Source(
        f"{kind} {' '.join(patterns)}", files, lambda: (item for path in files for item in read(path))
    )


def _texts(path: Path, separator: str | None) -> Iterator[Document | Dropped]:
    if separator is None:
        yield from_bytes(b"".join(chunks(path)).removeprefix(codecs.BOM_UTF8))
    else:
        for number, piece in enumerate(_split(chunks(path), separator.encode())):
            yield from_bytes(piece if number else piece.removeprefix(codecs.BOM_UTF8))


def _lines(path: Path, config: JsonlSource, tolerant: bool) -> Iterator[Document | Dropped]:
    for number, line in _numbered(path):
        if config.url_field is None and (text := _plain_text(line, config.text_field)) is not None:
            yield from_text(text)
            continue
        where, item = f"{path}:{number}", from_bytes(line)
        if isinstance(item, Dropped):
            yield item
            continue
        try:
            yield _from_json(item.text, config, where)
        except _BadRowError as bad:
            if not tolerant:
                raise
            yield Dropped(bad.reason, item.num_bytes, where, item.text[:_SAMPLE])


def _conversations(path: Path, field: str) -> Iterator[Document | Dropped]:
    for where, item in _documents_in(path):
        if isinstance(item, Dropped):
            yield item
        else:
            row = _row(item.text, field, where, "messages_field")
            yield conversation(row[field], item.num_bytes, where)


def _documents_in(path: Path) -> Iterator[tuple[str, Document | Dropped]]:
    """(where, the line) for each that is not blank."""
    for number, line in _numbered(path):
        yield f"{path}:{number}", from_bytes(line)


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, and the number of each."""
    for number, line in enumerate(_split(chunks(path), b"\n"), start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
            for begins, what in _OTHER_KINDS.items():
                if line.startswith(begins):
                    raise DataError(f"{path}: this is no JSON but {what}.")
        if line.strip():
            yield number, line


def _plain_text(line: bytes, text_field: str) -> str | None:
    """What nearly every line holds, at twice the speed of `json`; None leaves the line, and its faults, to `json`."""
    try:
        row = from_json(line)
    except ValueError:
        return None
    value = row.get(text_field) if isinstance(row, dict) else None
    return value if isinstance(value, str) else None


def _row(line: str, key: str, where: str, setting: str) -> dict[str, Any]:
    """An object that has `key`, which the source's `setting` names."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _BadRowError(
            "not JSON",
            f"{where}: this line is not JSON ({error}). Mend or remove it; a file that was cut ends like this.",
        ) from None
    return _having(row, key, where, setting)


def _having(row: Any, key: str, where: str, setting: str) -> dict[str, Any]:
    if not isinstance(row, dict) or key not in row:
        keys = ", ".join(map(repr, row)) if isinstance(row, dict) else f"no object but {row!r:.40}"
        raise _BadRowError(
            f"no {key}",
            f"{where}: there is no {key!r} in this line, only {keys}. Set the source's {setting}.",
        )
    return row


def _from_json(line: str, config: JsonlSource, where: str) -> Document | Dropped:
    row = _row(line, config.text_field, where, "text_field")
    text = _string(row[config.text_field], config.text_field, where, "text_field", "a document")
    if config.url_field is None:
        return from_text(text)
    value = _having(row, config.url_field, where, "url_field")[config.url_field]
    return from_text(text, _string(value, config.url_field, where, "url_field", "an address") or "")


def _string(value: Any, key: str, where: str, setting: str, what: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise _BadRowError(
        "not a string",
        f"{where}: {key!r} is {value!r:.60}, but {what} must be a string. Set the source's {setting}.",
    )


def _rows(path: Path, config: ParquetSource) -> Iterator[Document | Dropped]:
    import pyarrow as pa  # half a second that other sources need not pay
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = [_check_column(path, file.schema_arrow, config.text_field, "text_field", "a document")]
            if config.url_field is not None:
                columns.append(
                    _check_column(path, file.schema_arrow, config.url_field, "url_field", "an address")
                )
            for batch in file.iter_batches(_ROWS, columns=columns):
                # As bytes, since pyarrow does not promise that strings are UTF-8.
                texts, *urls = (batch.column(name).cast(pa.large_binary()).to_pylist() for name in columns)
                for raw, url in zip(texts, urls[0] if urls else repeat(None), strict=False):
                    yield (
                        Dropped("null", 0)
                        if raw is None
                        else from_bytes(raw, (url or b"").decode(errors="replace"))
                    )
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: this parquet file cannot be read ({_brief(error)}). It is cut or damaged: copy it again."
        ) from None


def _check_column(path: Path, schema: Any, name: str, setting: str, what: str) -> str:
    """The name; raises `DataError` unless there is such a column, of strings."""
    import pyarrow as pa

    if name not in schema.names:
        raise DataError(
            f"{path}: there is no column {name!r}, only {', '.join(map(repr, schema.names))}. "
            f"Set the source's {setting}."
        )
    if (count := schema.names.count(name)) > 1:
        raise DataError(f"{path}: there are {count} columns {name!r}. Rename or remove all but one of them.")
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()):
        raise DataError(
            f"{path}: column {name!r} holds {kind}, but {what} must be a string. Set the source's {setting}."
        )
    return name


def _split(chunks: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    """What stands between separators; after the last one, only if there is anything."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(separator)
        yield from whole
    if rest:
        yield rest


def chunks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file; raises `DataError` if it cannot be read to its true end."""
    import zstandard

    try:
        with path.open("rb") as file:
            kind = path.suffix.lower()
            if kind in (".gz", ".zst") and not os.fstat(file.fileno()).st_size:
                raise EOFError("it is empty, which a compressed file of nothing is not")
            if kind == ".gz":
                with gzip.open(file) as plain:
                    yield from iter(partial(plain.read, _CHUNK), b"")
            elif kind == ".zst":
                yield from _unzstd(iter(partial(file.read, _CHUNK), b""))
            else:
                yield from iter(partial(file.read, _CHUNK), b"")
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"{path}: this file cannot be read to its end ({_brief(error)}). It is cut or damaged: copy it again."
        ) from None


def _unzstd(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Frames end to end. zstandard's own stream reader takes a cut frame for the end of the file."""
    import zstandard

    frame = None
    for chunk in chunks:
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last zstd frame has no end")


def _brief(error: BaseException) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
