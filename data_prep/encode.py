"""Parts and verdicts -> shards of each split, and what became of each document."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_prep import parts, report, shares, vocabulary
from data_prep.documents import Document, Source
from data_prep.encoder import Encoder
from data_prep.recipe import BpeTokenizer, ExistingTokenizer, ValidationSplit
from data_prep.records import Facts
from data_prep.splits import SplitWriter
from data_prep.verdicts import REASONS
from moe.data.shards import TOKENIZER_NAME, FileStamp, Split, token_dtype

SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Part:
    """A part's file, and the file of its verdicts if there are any."""

    texts: Path
    verdicts: Path | None

    def load(self) -> np.typing.NDArray[np.uint8] | None:
        return None if self.verdicts is None else np.load(self.verdicts)


@dataclass(frozen=True)
class MakeTokenizer:
    """The work of a unit: `tokenizer/` as `Vocabulary.save` writes it, trained on what was kept, or copied."""

    config: BpeTokenizer | ExistingTokenizer
    sources: tuple[tuple[str, tuple[Part, ...]], ...]

    def __call__(self, folder: Path) -> Facts:
        if isinstance(self.config, ExistingTokenizer):
            made = vocabulary.load(self.config)
        else:
            made = vocabulary.train(self.config, [_source(name, of) for name, of in self.sources])
        facts = made.save(folder / TOKENIZER_NAME)
        for path in (folder / TOKENIZER_NAME).iterdir():
            path.rename(folder / path.name)
        (folder / TOKENIZER_NAME).rmdir()
        return {"eos_token": made.eos_token, "pad_token": made.pad_token, "tokenizer": facts.model_dump()}


def _source(name: str, of: tuple[Part, ...]) -> Source:
    return Source(
        name,
        (),
        lambda: (
            Document(text.decode(), len(text))
            for part in of
            for batch in parts.kept(part.texts, part.load())
            for text in batch
        ),
    )


@dataclass(frozen=True)
class Encode:
    """The work of a unit: the shards of one part."""

    part: Part
    tokenizer: Path
    eos_token: str
    pad_token: str
    fast: bool
    validation: ValidationSplit
    shard_tokens: int

    def __call__(self, folder: Path) -> Facts:
        page = FileStamp.of(self.tokenizer / "tokenizer.json").xxh3_128
        encoder = _encoder(self.tokenizer, page, self.eos_token, self.pad_token, self.fast)
        verdicts_D = self.part.load()
        dtype = token_dtype(encoder.vocabulary.size)
        dropped: dict[str, Counter[str]] = {}
        examples: dict[str, list[str]] = {}
        documents = size = at = 0
        with ExitStack() as stack:
            writers = {split: SplitWriter(folder, split, dtype, self.shard_tokens) for split in SPLITS}
            for writer in writers.values():
                stack.callback(writer.abandon)
            for batch in parts.texts(self.part.texts):
                kept = batch
                if verdicts_D is not None:
                    verdicts_B = verdicts_D[at : at + len(batch)].tolist()
                    kept = [text for text, verdict in zip(batch, verdicts_B, strict=True) if not verdict]
                    for text, verdict in zip(batch, verdicts_B, strict=True):
                        if verdict:
                            count = dropped.setdefault(REASONS[verdict], Counter())
                            if count["documents"] < report.EXAMPLES:
                                begins = text[: 4 * report.LETTERS].decode(errors="ignore")[: report.LETTERS]
                                examples.setdefault(REASONS[verdict], []).append(begins)
                            count.update(documents=1, bytes=len(text))
                at += len(batch)
                documents += len(kept)
                size += sum(map(len, kept))
                shares.encode(kept, encoder, writers, self.validation)
            splits = {split: writer.close() for split, writer in writers.items()}
        return {
            "read": {"documents": at, "bytes": size + sum(count["bytes"] for count in dropped.values())},
            "kept": {"documents": documents, "bytes": size},
            "dropped": {reason: dict(count) for reason, count in dropped.items()},
            "examples": examples,
            "splits": {split: facts.model_dump() for split, facts in splits.items() if facts},
        }


@lru_cache(maxsize=1)  # a worker encodes part after part; `page`, a hash, is there for the key
def _encoder(folder: Path, page: str, eos_token: str, pad_token: str, fast: bool) -> Encoder:
    config = ExistingTokenizer(type="file", path=str(folder), eos_token=eos_token, pad_token=pad_token)
    return Encoder(vocabulary.load(config), fast=fast)
