"""The text of a folder -> JSON lines for the benchmark, and a tokenizer of them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep import peers, vocabulary
from data_prep.documents import Document, Source, from_bytes
from data_prep.recipe import BpeTokenizer
from moe import log

FILES_A_WORKER = 10
_KINDS = {".py", ".md", ".rst", ".txt"}


def make(place: Path, root: Path, megabytes: int, workers: int, *, copies: int | None = None) -> list[Path]:
    """JSON lines of equal text in ten files a worker; for its size see `num_bytes`.

    With `copies`, so many of each document, and the number of the copy before its text: more text of the same kind.
    """
    count = workers * FILES_A_WORKER
    files = [place / f"{number:02d}.jsonl" for number in range(count)]
    sizes = [0] * count
    pages = [path.open("w", encoding="utf-8") for path in files]
    for copy in range(copies or 1):
        left = megabytes * 10**6
        for text in _read(root):
            number = sizes.index(min(sizes))
            begins = "" if copies is None else f"{copy} "
            pages[number].write(json.dumps({"text": begins + text.text}) + "\n")
            sizes[number] += len(begins) + text.num_bytes
            left -= text.num_bytes
            if left <= 0:
                break
    for page, path, size in zip(pages, files, sizes, strict=True):
        page.close()
        with _sized(path).open("wb") as file:
            file.truncate(size)
    if left > 0:
        log.get().warning("%s holds only %d MB of text", root, megabytes - left // 10**6)
    return files


def num_bytes(files: Sequence[Path]) -> int:
    """Of the text in them."""
    return sum(_sized(path).stat().st_size for path in files)


def _sized(path: Path) -> Path:
    """An empty file as large as the text in `path`."""
    return path.with_suffix(".size")


def _read(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*")):
        if path.suffix in _KINDS and path.is_file():
            found = from_bytes(path.read_bytes())
            if isinstance(found, Document):
                yield found


def tokenizer(place: Path, files: Sequence[Path]) -> Path:
    """Of 32,000 tokens, trained on a part of the text."""
    texts = (text for path in files for batch in peers.lines(path) for text in batch)
    source = Source("sample", (), lambda: (Document(text, len(text.encode())) for text in texts))
    config = BpeTokenizer(type="bpe", vocab_size=32_000, sample_megabytes=20, min_frequency=1)
    vocabulary.train(config, [source]).save(place / "tokenizer")
    return place / "tokenizer"
