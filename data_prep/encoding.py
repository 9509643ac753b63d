"""Texts of a unit -> its shards: how they are encoded, and the files as they are written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from data_prep import shares, vocabulary
from data_prep.batches import BATCH_BYTES
from data_prep.encoder import Encoder
from data_prep.recipe import ExistingTokenizer, ValidationSplit
from data_prep.records import Facts
from data_prep.splits import SplitWriter
from moe.data.shards import FileStamp, Split, token_dtype

SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Encoding:
    """How texts become shards."""

    tokenizer: Path
    eos_token: str
    pad_token: str
    fast: bool
    validation: ValidationSplit
    shard_tokens: int

    @contextmanager
    def open(self, folder: Path) -> Iterator["Shards"]:
        """Shards to write in `folder`."""
        page = FileStamp.of(self.tokenizer / "tokenizer.json").xxh3_128
        encoder = _encoder(self.tokenizer, page, self.eos_token, self.pad_token, self.fast)
        dtype = token_dtype(encoder.vocabulary.size)
        writers = {split: SplitWriter(folder, split, dtype, self.shard_tokens) for split in SPLITS}
        try:
            yield Shards(encoder, self.validation, writers)
        finally:
            for writer in writers.values():
                writer.abandon()  # an open file holds its room on the disk


@dataclass
class Shards:
    """The shards of a unit as they are written."""

    encoder: Encoder
    validation: ValidationSplit
    writers: dict[Split, SplitWriter]
    documents: int = 0
    num_bytes: int = 0

    def write(self, texts: Sequence[bytes]) -> None:
        """Append documents of UTF-8."""
        for batch in _batches(texts):
            shares.encode(batch, self.encoder, self.writers, self.validation)
        self.documents += len(texts)
        self.num_bytes += sum(map(len, texts))

    def close(self) -> Facts:
        """What was kept, and the splits."""
        splits = {split: writer.close() for split, writer in self.writers.items()}
        return {
            "kept": {"documents": self.documents, "bytes": self.num_bytes},
            "splits": {split: facts.model_dump() for split, facts in splits.items() if facts},
        }


def _batches(texts: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    begin = size = 0
    for end, text in enumerate(texts, start=1):
        size += len(text)
        if size >= BATCH_BYTES or end == len(texts):
            yield texts[begin:end]
            begin, size = end, 0


@lru_cache(maxsize=1)  # a worker encodes part after part; `page`, a hash, is there for the key
def _encoder(folder: Path, page: str, eos_token: str, pad_token: str, fast: bool) -> Encoder:
    config = ExistingTokenizer(type="file", path=str(folder), eos_token=eos_token, pad_token=pad_token)
    return Encoder(vocabulary.load(config), fast=fast)
