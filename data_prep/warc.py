"""WARC files, plain, .gz or .zst -> documents: what crawlers kept as plain text, and the text of pages in HTML."""

import io
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep import files
from data_prep.documents import Document, Dropped, Source, from_bytes, from_text
from data_prep.paths import matches
from data_prep.recipe import WarcSource
from moe.errors import DataError

MARKED_UP = "no plain text"
NO_TEXT = "no text in the page"
UNKNOWN_ENCODING = "unknown encoding"
_WITH_TEXT = ("conversion", "resource", "response")
_PAGES = ("text/html", "application/xhtml+xml")
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]+)")
_HEAD = 2048

Extract = Callable[[str], str | None]


def warc(config: WarcSource) -> Source:
    """A record with text is a document. Images and the like are dropped, pages in HTML too, unless the source says
    html; requests and notes are no documents.

    Raises `DataError` without warcio, or trafilatura where pages are read.
    """
    try:
        import warcio  # noqa: F401  said before any work is done
    except ImportError:
        raise DataError(
            "a source of type warc needs warcio, which is not installed: pip install 'turnout[warc]', or convert the "
            "files to jsonl."
        ) from None
    extract = _extractor() if config.html else None
    paths = matches(config.paths)
    return Source(
        f"warc {' '.join(config.paths)}",
        paths,
        lambda: (item for path in paths for item in _items(path, extract)),
    )


def _extractor() -> Extract:
    try:
        import trafilatura  # noqa: F401  said before any work is done
        from datatrove.pipeline.extractors import Trafilatura
    except ImportError as error:
        raise DataError(
            f"html of a source of type warc needs trafilatura and datatrove, which are not all installed ({error}): "
            f"pip install 'turnout[html]', or leave it out, and pages in HTML are dropped."
        ) from None

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # a line for every page without text
    # It would drop what it has seen three times in this process: then order would matter.
    extract: Extract = Trafilatura(deduplicate=False).extract
    return extract


def _items(path: Path, extract: Extract | None) -> Iterator[Document | Dropped]:
    from warcio.archiveiterator import ArchiveIterator

    # Decompressed by us, since warcio takes a cut .gz for the end of the file.
    records = ArchiveIterator(io.BufferedReader(_Chunks(files.chunks(path))), no_record_parse=True)
    while (record := _next(records, path)) is not None:
        if record.rec_type in _WITH_TEXT:
            yield _document(record, path, extract)
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


def _document(record: Any, path: Path, extract: Extract | None) -> Document | Dropped:
    """Of a response without its HTTP: headers, chunks and compression. The bytes of a page are those of its text."""
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
    said = headers.get_header("Content-Type") or ""
    kind = said.partition(";")[0].strip().lower()
    url = (record.rec_headers.get_header("WARC-Target-URI") or "").strip("<>")
    if kind == "text/plain":
        return from_bytes(raw, url)
    if extract is None or kind not in _PAGES:
        return Dropped(MARKED_UP, len(raw))
    return _text_of_page(raw, said, url, extract)


def _text_of_page(raw: bytes, said: str, url: str, extract: Extract) -> Document | Dropped:
    page = _decoded(raw, said)
    if page is None:
        return Dropped(UNKNOWN_ENCODING, len(raw))
    try:
        text = extract(page)
    except Exception:  # lxml and trafilatura raise whatever a broken page leads to
        text = None
    return from_text(text, url) if text else Dropped(NO_TEXT, len(raw))


def _decoded(raw: bytes, said: str) -> str | None:
    """As UTF-8 if it is, else as the header `said` or the page says; null if neither does, or no one knows it."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        pass
    for match in (_CHARSET.search(said.encode().lower()), _CHARSET.search(raw[:_HEAD].lower())):
        if match:
            try:
                return raw.decode(match[1].decode(), errors="replace")
            except LookupError:
                continue
    return None


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
