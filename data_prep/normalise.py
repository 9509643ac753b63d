"""A text -> what ftfy makes of it; lines of plain ASCII, which it would look at long and leave alone, are copied.

ftfy mends line by line, in some 20 us each. A line is safe where all of it is printable ASCII, but for `&`, or tabs:
no mojibake, entity, quote, ligature or control character can be in it.
"""

import re
from typing import Any

_ODD = re.compile(r"[^\t\n\f\x20-%'-~]")
"""What may make ftfy change its line."""


class Normaliser:
    """`ftfy.fix_text`, to the character."""

    def __init__(self, ftfy: Any) -> None:
        self._fix_text = ftfy.fix_text
        self._config = ftfy.TextFixerConfig(explain=False)
        self._of_markup = self._config._replace(unescape_html=False)

    def __call__(self, text: str) -> str:
        """The text itself if nothing in it could change."""
        odd = _ODD.search(text)
        if odd is None:
            return text
        # From the line with the first tag on, ftfy takes a text for markup, and leaves its entities alone.
        tag, parts, at = text.find("<"), [], 0
        while odd is not None:
            begin = max(text.rfind("\n", at, odd.start()) + 1, at)
            end = text.find("\n", odd.start()) + 1 or len(text)
            config = self._of_markup if 0 <= tag < begin else self._config
            parts += [text[at:begin], self._fix_text(text[begin:end], config)]
            odd, at = _ODD.search(text, end), end
        return "".join([*parts, text[at:]])
