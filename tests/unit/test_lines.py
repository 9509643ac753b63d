"""Lines of JSON are read the fast way only where that finds what `json` does."""

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.files import _plain_text

_BITS = [
    b"{", b"}", b"[", b"]", b":", b",", b'"', b'"text"', b'"x"', b'"text":"y"', b"\\u", b"d800", b"\\x", b"\\n", b"\\/",
    b"\\ud83d\\ude00", b"\t", b"\x00", b"\x1f", b"\x0b", b"\xff", b"\xed\xa0\x80", b"\xc3\xa9", b"\xa0", b"NaN",
    b"\xef\xbb\xbf", b"-Infinity", b"-NaN", b"01", b"1.", b".5", b"1e999", b"9" * 400, b"null", b" ",
    b"[" * 300 + b"]" * 300,
]  # fmt: skip
_SOME = st.lists(st.sampled_from(_BITS), max_size=6).map(b"".join)


@settings(max_examples=400, deadline=None, derandomize=True)
@example(line=b'{"text":"a", "text":"b"}')
@given(
    line=_SOME
    | _SOME.map(lambda bits: b'{"text":"x' + bits + b'"}')
    | _SOME.map(lambda bits: b'{"text":"x","z":' + bits + b"}")
)
def test_the_fast_reading_of_a_line_finds_what_json_finds_or_leaves_it(line: bytes) -> None:
    found = _plain_text(line, "text")
    if found is not None:
        assert found == json.loads(line.decode())["text"]


def test_the_fast_reading_takes_plain_lines() -> None:
    assert _plain_text('{"id": 1, "text": "é\\n\\u00e9"}'.encode(), "text") == "é\né"
    assert _plain_text(b'{"text": 1}', "text") is None
