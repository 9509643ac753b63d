"""Texts as UTF-8 -> token ids end to end, by the fastest encoder that gives just what `tokenizers` gives.

gigatoken knows certain split patterns and encodes those some thirty times as fast. It is taken only where it equals
`tokenizers` on strings chosen to trip it, and a share of all that it encodes is encoded a second time and compared.
Texts with characters so young that two libraries may hold them for different kinds are left to `tokenizers`.
"""

import ctypes
import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from tokenizers import Tokenizer

from data_prep.vocabulary import Vocabulary
from moe import log
from moe.data.shards import token_dtype
from moe.errors import DataError

_ASCII = bytes(range(128))
_SHARE = 512
_LONGEST_CHECKED = 20_000
_GROUP_BYTES = 200_000
_REMEMBERED_BYTES = 96 << 20
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_PROBES = (
    " ",
    "\n\n\n",
    "  \t\t  \r\n x",
    "I'LL don'T 'S it\u2019s a'sb",
    "123456789012 \u00bd\u00b2\u00b3 \u0663\u0664 \u0967\u0968\u0969",
    "e\u0301 \u00e9 \u017f \u212a \u01c5\u01c6 \u02b0 \u2177",
    "\u65e5\u672c\u8a9e\u30c6\u30ad\u30b9\u30c8 \u4e2d\u6587 \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff \ud7ff",
    "\x00\x01\x1c\x1d\x0b\x0c\x85\u2028\u200b\ufeff\u00a0\u3000\u180e x",
    "a" * 3000,
    " " * 3000,
    "def f(x):\n\treturn {'a': [1, 2.5e-3], **x}  # https://example.org/?q=1&r=%20\n",
    "<|endoftext|> <|pad|> </s> [UNK] <unk>",
)


@dataclass(frozen=True)
class Ids:
    """Documents end to end: `ids_N` in the shards' dtype, `lengths_D` tokens each, the end of each included."""

    ids_N: npt.NDArray[Any]
    lengths_D: npt.NDArray[np.int64]


class Encoder:
    """Encodes with `vocabulary`. With `fast`, by gigatoken if it is there and knows this tokenizer.

    gigatoken 0.10 remembers every word that it has met, some 90 bytes each, for ever. So it is made anew, which takes
    a tenth of a second, whenever this process has grown by `remembered_bytes` since it was made; on Linux alone, where
    a process can tell at no cost. What it remembers decides its speed, never the ids.
    """

    def __init__(
        self, vocabulary: Vocabulary, *, fast: bool = True, remembered_bytes: int = _REMEMBERED_BYTES
    ) -> None:
        self.vocabulary = vocabulary
        self._remembered_bytes = remembered_bytes
        self._dtype = np.dtype(token_dtype(vocabulary.size))
        self._eos_id = vocabulary.eos_id
        self._fast = _gigatoken(vocabulary.tokenizer) if fast else None
        self._began_with = _resident_bytes()

    @property
    def name(self) -> str:
        """The library that encodes."""
        return "tokenizers" if self._fast is None else "gigatoken"

    def encode(self, texts: Sequence[bytes]) -> Ids:
        """Of UTF-8. Raises `DataError` if the fast encoder and `tokenizers` disagree on the share compared."""
        if not texts:
            return Ids(np.empty(0, self._dtype), np.empty(0, np.int64))
        self._forget()
        if self._fast is None:
            return self._join(self._reference(texts))
        rows = _encoded(self._fast, texts)
        young = [at for at, text in enumerate(texts) if _is_young(text)]
        for at, ids in zip(young, self._reference(texts[at] for at in young), strict=True):
            rows[at] = ids
        self._compare(texts, rows)
        return self._join(rows)

    def _forget(self) -> None:
        if self._fast is None or _resident_bytes() - self._began_with <= self._remembered_bytes:
            return
        self._fast = None  # or there would be two of them for a while
        _give_back()
        self._fast = _gigatoken(self.vocabulary.tokenizer)
        self._began_with = _resident_bytes()

    def _reference(self, texts: Iterable[bytes]) -> list[npt.NDArray[Any]]:
        return [
            np.array(encoding.ids, self._dtype)
            for group in _groups(texts)
            for encoding in self.vocabulary.tokenizer.encode_batch_fast(group, add_special_tokens=False)
        ]

    def _join(self, rows: Sequence[npt.NDArray[Any]]) -> Ids:
        lengths_D = np.fromiter(map(len, rows), np.int64, len(rows)) + 1
        end = np.array([self._eos_id], self._dtype)
        parts = [part for row in rows for part in (row, end)]
        return Ids(np.concatenate(parts, dtype=self._dtype, casting="unsafe"), lengths_D)

    def _compare(self, texts: Sequence[bytes], rows: Sequence[npt.NDArray[Any]]) -> None:
        chosen = [at for at, text in enumerate(texts) if len(text) <= _LONGEST_CHECKED and _is_checked(text)]
        for at, ids in zip(chosen, self._reference(texts[at] for at in chosen), strict=True):
            if not np.array_equal(rows[at], ids):
                raise DataError(
                    f"gigatoken and tokenizers encode {texts[at].decode()!r:.80} in different ways. Nothing was "
                    f"written: set tokenizer.fast=false, which is slow and exact."
                )


def _groups(texts: Iterable[bytes]) -> Iterator[list[str]]:
    """As strings, a few at a time: what `tokenizers` says of a text takes thirty times the room of its ids."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text.decode())
        size += len(text)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _is_checked(text: bytes) -> bool:
    """By the text itself, so that the same documents are compared whatever the batches are."""
    return xxhash.xxh3_64_intdigest(text, seed=1) % _SHARE == 0


def _is_young(text: bytes) -> bool:
    """Whether it has a character that this Python's Unicode does not know.

    A library with a younger Unicode may take it for a letter (gigatoken 0.10 U+A7CF), one with an older for none.
    """
    if text.isascii():
        return False
    others = text.translate(None, _ASCII)  # bytes of one character stay together
    codes_C = np.frombuffer(others.decode().encode("utf-32-le"), "<u4")
    return bool(_unassigned()[codes_C].any())


def _resident_bytes() -> int:
    """Memory of this process; 0 where the system has no such page."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE_BYTES


def _give_back() -> None:
    """Free memory goes back to the system, and does not count as this process's; by glibc, where that is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _unassigned() -> npt.NDArray[np.bool_]:
    """Of each code point, whether it is without a meaning."""
    kinds = (unicodedata.category(chr(code)) for code in range(sys.maxunicode + 1))
    return np.fromiter((kind == "Cn" for kind in kinds), np.bool_, sys.maxunicode + 1)


def _gigatoken(tokenizer: Tokenizer) -> Any | None:
    """A gigatoken tokenizer that has shown itself equal; None if there is none."""
    try:
        import gigatoken
    except ImportError:
        log.get().info("gigatoken is not installed (pip install 'turnout[data]'): encoding takes longer")
        return None
    page = json.loads(tokenizer.to_str())
    if any(not token["special"] for token in page["added_tokens"]):
        return None  # these are matched in text before it is split, which gigatoken would do for special ones too
    page["added_tokens"] = []  # or the name of a special token in a text would become that token
    try:
        found = gigatoken.Tokenizer.from_json(json.dumps(page)).backend
        rows = _encoded(found, [probe.encode() for probe in _PROBES])
    except Exception as error:  # gigatoken raises whatever it met with
        log.get().info("gigatoken does not know this tokenizer (%s): encoding by tokenizers", error)
        return None
    expected = tokenizer.encode_batch_fast(list(_PROBES), add_special_tokens=False)
    for probe, row, encoding in zip(_PROBES, rows, expected, strict=True):
        if row.tolist() != encoding.ids:
            log.get().warning(
                "gigatoken encodes %r otherwise than tokenizers, which encodes instead", probe[:30]
            )
            return None
    return found


def _encoded(fast: Any, texts: Sequence[bytes]) -> list[npt.NDArray[np.uint32]]:
    """One by one, which is as fast as gigatoken's batches and spares the import of awkward, a third of a second."""
    return [fast.encode(text) for text in texts]
