"""WARC: plain text is kept, the rest is counted, and a file that is cut or none is said."""

import io
import re
import sys
from pathlib import Path

import pytest

from data_prep.recipe import WarcSource
from data_prep.warc import warc
from moe.errors import DataError
from tests.unit.corpus import (
    PREPARED,
    TEXTS,
    all_texts,
    cut,
    page,
    prepared,
    refused,
    run,
    write_text,
)

REASON = "warcio is an extra: pip install 'turnout[warc]'"
PAGE = b"<html>no text</html>"


def _archive(path: Path, texts: list[bytes]) -> Path:
    """As Common Crawl's: a note, texts, a request, a page in HTML and a page of text."""
    pytest.importorskip("warcio", reason=REASON)
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import BufferWARCWriter

    writer = BufferWARCWriter(gzip=False)
    writer.write_record(writer.create_warcinfo_record("a.warc", {"software": "test"}))
    for number, text in enumerate(texts):
        record = writer.create_warc_record(
            f"https://example.org/{number}",
            "conversion",
            payload=io.BytesIO(text),
            length=len(text),
            warc_content_type="text/plain",
        )
        writer.write_record(record)
    asked = StatusAndHeaders("GET / HTTP/1.1", [("Host", "example.org")], is_http_request=True)
    writer.write_record(writer.create_warc_record("https://example.org", "request", http_headers=asked))
    for kind, content in (("text/html", PAGE), ("text/plain; charset=utf-8", b"plain and whole")):
        told = StatusAndHeaders("200 OK", [("Content-Type", kind)], protocol="HTTP/1.1")
        writer.write_record(
            writer.create_warc_record(
                "https://example.org", "response", payload=io.BytesIO(content), http_headers=told
            )
        )
    return write_text(path, writer.get_contents())


@pytest.mark.parametrize(
    ("suffix", "staged"),
    [(".gz", True), *(pytest.param(suffix, False, marks=pytest.mark.slow) for suffix in ("", ".gz", ".zst"))],
)
def test_plain_text_is_kept_and_the_rest_counted(tmp_path: Path, suffix: str, staged: bool) -> None:
    path = _archive(tmp_path / f"a.warc{suffix}", [*map(str.encode, TEXTS), b"", b"\xff"])
    settings = {"executor": {"workers": 1}} if staged else {}
    data = prepared(tmp_path, [{"type": "warc", "paths": [str(path)]}], **settings)
    (source,) = data.manifest.sources
    assert {why: amount.model_dump() for why, amount in source.dropped.items()} == {
        "empty": {"documents": 1, "bytes": 0},
        "invalid UTF-8": {"documents": 1, "bytes": 1},
        "no plain text": {"documents": 1, "bytes": len(PAGE)},
    }
    assert source.read.documents == len(TEXTS) + 4
    assert all_texts(data) == sorted([*TEXTS, "plain and whole"])


@pytest.mark.parametrize(
    ("suffix", "keep"), [("", 0.5), ("", 0.97), (".gz", 0.5), (".gz", 0.99), (".zst", 0.5)]
)
def test_a_cut_archive_is_said(tmp_path: Path, suffix: str, keep: float) -> None:
    texts = [text.encode() for text in TEXTS]
    path = cut(_archive(tmp_path / f"a.warc{suffix}", texts), keep)
    result = run(tmp_path, page(tmp_path, [{"type": "warc", "paths": [str(path)]}]))
    refused(result, f"{path}: ", "opy it again")
    assert not (tmp_path / PREPARED).exists()


@pytest.mark.slow
def test_wherever_an_archive_is_cut_within_a_record_it_is_said(tmp_path: Path) -> None:
    path = _archive(tmp_path / "a.warc", [b"one", b"two"])
    whole, silent = path.read_bytes(), []
    marks = [m.end() for m in re.finditer(rb"\r\n\r\n|Content-Length: \d+", whole)]
    places = sorted({*range(0, len(whole), 23), *(at - back for at in marks for back in range(9))})
    for at in places:
        path.write_bytes(whole[:at])
        items = warc(WarcSource(type="warc", paths=[str(path)])).items()
        if _is_between(whole, at):
            silent.append(len(list(items)))
        else:
            with pytest.raises(DataError, match=r"a\.warc: "):
                list(items)
    assert set(silent) == {0, 1, 2, 3, 4}


def _is_between(whole: bytes, at: int) -> bool:
    """Whether no record is cut there: within the empty lines that end one, or in a word that is none yet."""
    ends = [0, *(m.start() for m in re.finditer(rb"(?<=\r\n\r\n)WARC/1", whole)), len(whole)]
    return any(end - 4 <= at <= end + 1 for end in ends)


def test_what_is_no_archive_is_said(tmp_path: Path) -> None:
    pytest.importorskip("warcio", reason=REASON)
    path = write_text(tmp_path / "a.warc", b"just text\nand more of it\n")
    refused(run(tmp_path, page(tmp_path, [{"type": "warc", "paths": [str(path)]}])), f"{path}: ", "no WARC")


def test_without_warcio_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "warcio", None)
    result = run(tmp_path, page(tmp_path, [{"type": "warc", "paths": ["a.warc"]}]))
    refused(result, "pip install 'turnout[warc]'")


HTML = "'turnout[html]' brings trafilatura"
SAID = [
    "The signal at the turnout stood at red for most of the day, and nobody in the yard could say why it did so.",
    "A second paragraph tells of wagons that were moved to the siding before noon, with care and little haste.",
]


def _page(paragraphs: list[str], head: str = "") -> str:
    text = "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)
    menu = "<nav><ul><li><a href='/'>Home</a></li><li><a href='/all'>All pages</a></li></ul></nav>"
    return f"<html><head>{head}<title>t</title></head><body>{menu}<article>{text}</article></body></html>"


def _web(path: Path, pages: list[tuple[str, str, bytes]]) -> Path:
    """Responses of (address, content type, content)."""
    pytest.importorskip("warcio", reason=REASON)
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import BufferWARCWriter

    writer = BufferWARCWriter(gzip=False)
    for url, kind, content in pages:
        told = StatusAndHeaders("200 OK", [("Content-Type", kind)], protocol="HTTP/1.1")
        record = writer.create_warc_record(url, "response", payload=io.BytesIO(content), http_headers=told)
        writer.write_record(record)
    return write_text(path, writer.get_contents())


def test_the_text_of_pages_is_taken_and_what_has_none_is_counted(tmp_path: Path) -> None:
    for module in ("datatrove", "trafilatura"):
        pytest.importorskip(module, reason=HTML)
    russian = [
        "\u0421\u0438\u0433\u043d\u0430\u043b \u0431\u044b\u043b \u043a\u0440\u0430\u0441\u043d\u044b\u043c. "
        * 8
    ]
    pages = [
        ("http://a.example/1", "text/html; charset=utf-8", _page(SAID).encode()),
        ("http://a.example/2", "text/html; charset=windows-1251", _page(russian).encode("windows-1251")),
        (
            "http://a.example/3",
            "application/xhtml+xml",
            _page(["na\u00efve " * 40], "<meta charset='latin-1'>").encode("latin-1"),
        ),
        ("http://a.example/4", "text/html", b"<html>\xff</html>"),
        ("http://a.example/5", "text/html; charset=no-such", b"<html>\xff</html>"),
        ("http://a.example/6", "text/html", b"<html></html>"),
        ("http://a.example/7", "image/png", b"\x89PNG"),
        *((f"http://a.example/{n}", "text/html", _page(SAID).encode()) for n in range(8, 16)),
    ]
    path = _web(tmp_path / "a.warc.gz", pages)
    data = prepared(
        tmp_path,
        [{"type": "warc", "paths": [str(path)], "html": True}],
        executor={"workers": 1},
        validation={"fraction": 0.0},
    )
    (source,) = data.manifest.sources
    assert {why: amount.documents for why, amount in source.dropped.items()} == {
        "no plain text": 1,
        "no text in the page": 1,
        "unknown encoding": 2,
    }
    found = all_texts(data)
    assert found.count("\n".join(SAID)) == 9  # trafilatura's own memory of what it has seen would drop some
    assert len(found) == 11
    assert any(text.startswith("\u0421\u0438\u0433\u043d\u0430\u043b \u0431\u044b\u043b") for text in found)
    assert any(text.startswith("na\u00efve na\u00efve") for text in found)
    assert not any("Home" in text or "All pages" in text for text in found)


def test_pages_are_dropped_by_their_address(tmp_path: Path) -> None:
    addresses = [f"http://{'bad' if number % 3 else 'good'}.example/{number}" for number in range(30)]
    path = _web(
        tmp_path / "a.warc",
        [(url, "text/plain", text.encode()) for url, text in zip(addresses, TEXTS, strict=False)],
    )
    write_text(tmp_path / "block.txt", b"bad.example\n")
    data = prepared(
        tmp_path,
        [{"type": "warc", "paths": [str(path)]}],
        clean={"urls": {"block": [str(tmp_path / "block.txt")]}},
        executor={"workers": 1},
    )
    assert all_texts(data) == sorted(TEXTS[:30:3])
    assert data.manifest.sources[0].dropped["address: blocked"].documents == 20


def test_without_trafilatura_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _web(tmp_path / "a.warc", [("http://a.example", "text/html", b"<p>")])
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    result = run(tmp_path, page(tmp_path, [{"type": "warc", "paths": [str(path)], "html": True}]))
    refused(result, "pip install 'turnout[html]'", "leave it out")
