"""Parts and verdicts -> shards of each split, and what became of each document."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import parts, report, vocabulary
from data_prep.documents import Document, Source
from data_prep.encoding import BATCH_BYTES, Encoding
from data_prep.recipe import BpeTokenizer, ExistingTokenizer
from data_prep.records import Facts
from data_prep.texts import ReadAndClean
from data_prep.verdicts import REASONS
from moe.data.shards import TOKENIZER_NAME


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
    encoding: Encoding

    def __call__(self, folder: Path) -> Facts:
        verdicts_D = self.part.load()
        dropped: dict[str, Counter[str]] = {}
        examples: dict[str, list[str]] = {}
        at = 0
        with self.encoding.open(folder) as shards:
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
                shards.write(kept)
            facts = shards.close()
        read = facts["kept"]["bytes"] + sum(count["bytes"] for count in dropped.values())
        return {
            **facts,
            "read": {"documents": at, "bytes": read},
            "dropped": {reason: dict(count) for reason, count in dropped.items()},
            "examples": examples,
        }


@dataclass(frozen=True)
class ReadAndEncode:
    """The work of a unit: `ReadAndClean` and `Encode` in one, of text that is nothing between them to look at."""

    read: ReadAndClean
    encoding: Encoding

    def __call__(self, folder: Path) -> Facts:
        batch: list[bytes] = []
        waiting = 0

        def keep(text: bytes, _: int) -> None:
            nonlocal waiting
            batch.append(text)
            waiting += len(text)
            if waiting >= BATCH_BYTES:
                shards.write(batch)
                batch.clear()
                waiting = 0

        with self.encoding.open(folder) as shards:
            facts = self.read.read(folder, keep)
            shards.write(batch)
            ends = shards.close()
        return {**facts, **ends, "read": ends["kept"], "dropped": {}, "examples": {}}
