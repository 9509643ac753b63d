"""Normalising is ftfy's, to the character, and takes next to no time where there is nothing to mend."""

import time
from collections.abc import Callable

import ftfy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.normalise import Normaliser

PIECES = st.sampled_from(
    [
        *(
            "\n",
            "\r\n",
            "\r",
            "\f",
            "\t",
            "\v",
            "\x1b[31m",
            "\x00",
            "\x7f",
            "\x85",
            "\u2028",
            "\u00a0",
            "\ufeff",
        ),
        *("<", "<b>", "&amp;", "&lt;b", "&", "&hellip;", "plain text", "it's", "it\u2019s", "\u201cso\u201d"),
        *(
            "sÃ³",
            "voilÃ\xa0 le",
            "âœ” No",
            "e\u0301",
            "\ufb01ne",
            "\uff2c\uff2f",
            "漢字",
            "\ud83d",
            "\ude00",
            "Ã",
            "ÃƒÂ©",
        ),
    ]
)
TEXTS = st.lists(
    st.one_of(PIECES, st.characters(max_codepoint=255), st.characters(max_codepoint=0xFFFF)), max_size=14
).map("".join)


@settings(max_examples=120, deadline=None)
@example(text="&amp;\na < b &amp;\n&amp;")
@given(text=TEXTS)
def test_a_text_is_normalised_as_ftfy_does(text: str) -> None:
    assert Normaliser(ftfy)(text) == ftfy.fix_text(text)


@pytest.mark.slow
def test_a_line_that_ftfy_cuts_is_cut_where_ftfy_does() -> None:
    """After a million characters."""
    text = "plain\n" + "x" * 999_998 + "Ã³&amp;" * 2 + "\n&amp;"
    assert Normaliser(ftfy)(text) == ftfy.fix_text(text)


def test_every_character_alone_and_between_letters_is_normalised_as_ftfy_does() -> None:
    normalise = Normaliser(ftfy)
    for code in range(256):
        for text in (chr(code), f"a{chr(code)}b\n", f"a{chr(code)}", f"{chr(code)};\n<"):
            assert normalise(text) == ftfy.fix_text(text)


def test_plain_lines_cost_next_to_nothing() -> None:
    normalise, text = Normaliser(ftfy), "A line of plain text, such as most lines of English are.\n" * 2000
    assert normalise(text) is text
    usual, ours = (
        min(_seconds(mend, here) for _ in range(3))
        for mend, here in ((ftfy.fix_text, text), (normalise, text + "Naïve.\n"))
    )
    assert ours < usual / 5


def _seconds(mend: Callable[[str], str], text: str) -> float:
    """Of processor time."""
    began = time.process_time()
    assert mend(text) == text
    return time.process_time() - began
