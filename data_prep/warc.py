"""WARC files, plain, .gz or .zst -> documents: what crawlers kept as plain text, such as Common Crawl's WET files."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep import files
from data_prep.documents import Document, Dropped, Source, from_bytes
from data_prep.recipe import WarcSource
from moe.errors import DataError

MARKED_UP = "no plain text"
_WITH_TEXT = ("conversion", "resource", "response")


def warc(config: WarcSource) -> Source:
    """A record with text is a document. Pages in HTML and the like are dropped; requests and notes are no documents.

    Raises `DataError` without warcio.
    """
    try:
        import warcio  # noqa: F401  said before any work is done
    except ImportError:
        raise DataError(
            "a source of type warc needs warcio, which is not installed: pip install 'turnout[warc]', or convert the "
            "files to jsonl."
        ) from None
    paths = files.matches(config.paths)
    return Source(
        f"warc {' '.join(config.paths)}", paths, lambda: (item for path in paths for item in _items(path))
    )


def _items(path: Path) -> Iterator[Document | Dropped]:
    from warcio.archiveiterator import ArchiveIterator

    # Decompressed by us, since warcio takes a cut .gz for the end of the file.
    records = ArchiveIterator(io.BufferedReader(_Chunks(files.chunks(path))), no_record_parse=True)
    while (record := _next(records, path)) is not None:
        if record.rec_type in _WITH_TEXT:
            yield _document(record, path)
        else:
            _read(record, path)


def _next(records: Any, path: Path) -> Any:
    """None after the last one."""
    try:
        return next(records, None)
    except DataError:
        raise
    except Exception as error:  # warcio raises whatever a broken header leads to
        raise DataError(
            f"{path}: this file is no WARC, or damaged ({' '.join(str(error).split())[:200]}). Copy it again, or mend "
            f"the source's type."
        ) from None


def _document(record: Any, path: Path) -> Document | Dropped:
    """Of a response without its HTTP: headers, chunks and compression."""
    from warcio.statusandheaders import StatusAndHeadersParser

    raw = _read(record, path)
    headers = record.rec_headers
    if record.rec_type == "response":
        record.raw_stream = io.BytesIO(raw)
        try:
            headers = record.http_headers = StatusAndHeadersParser(["HTTP/"], verify=False).parse(
                record.raw_stream
            )
            raw = record.content_stream().read()
        except Exception:  # warcio raises whatever a broken header leads to
            return Dropped(MARKED_UP, len(raw))
    kind = (headers.get_header("Content-Type") or "").partition(";")[0].strip().lower()
    return from_bytes(raw) if kind == "text/plain" else Dropped(MARKED_UP, len(raw))


def _read(record: Any, path: Path) -> bytes:
    """The content of a record; raises `DataError` if there is less than it says."""
    length = (record.rec_headers.get_header("Content-Length") or "").strip()
    raw: bytes = record.raw_stream.read()
    if not length.isdigit() or int(length) != len(raw):
        raise DataError(
            f"{path}: the file ends within record {record.rec_headers.get_header('WARC-Record-ID')}. It is cut or "
            f"damaged: copy it again."
        )
    return raw


class _Chunks(io.RawIOBase):
    """Chunks as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = chunk
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
