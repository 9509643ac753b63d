"""Parts and verdicts -> shards of each split, and what became of each document."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep import parts, report, vocabulary
from data_prep.batches import Batches
from data_prep.documents import Document, Source
from data_prep.encoding import Encoding
from data_prep.recipe import BpeTokenizer, ExistingTokenizer
from data_prep.records import Facts
from data_prep.texts import ReadAndClean
from data_prep.verdicts import REASONS
from moe.data.shards import TOKENIZER_NAME
from moe.errors import DataError


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
        sieve = _Sieve(self.part.load())
        with self.encoding.open(folder) as shards:
            for batch in parts.texts(self.part.texts):
                shards.write(sieve.kept(batch))
            facts = shards.close()
        return {**facts, **sieve.close()}


@dataclass(frozen=True)
class ReadAndEncode:
    """The work of a unit: `ReadAndClean` and `Encode` in one, of text that is written nowhere between them."""

    read: ReadAndClean
    encoding: Encoding
    verdicts: Path | None = None

    def __call__(self, folder: Path) -> Facts:
        sieve = _Sieve(None if self.verdicts is None else np.load(self.verdicts))
        with self.encoding.open(folder) as shards:
            batches = Batches(lambda batch: shards.write(sieve.kept(batch)))
            facts = self.read.read(folder, batches.add)
            batches.close()
            ends = shards.close()
        return {**facts, **ends, **sieve.close()}


@dataclass
class _Sieve:
    """Lets those documents of a unit through whose verdict is 0, all of them without verdicts, and counts."""

    verdicts_D: np.typing.NDArray[np.uint8] | None
    read: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def kept(self, batch: list[bytes]) -> list[bytes]:
        """Of the next documents."""
        at = self.read["documents"]
        self.read.update(documents=len(batch), bytes=sum(map(len, batch)))
        if self.verdicts_D is None:
            return batch
        verdicts_B = self.verdicts_D[at : at + len(batch)]
        if len(verdicts_B) < len(batch):
            raise _changed(len(self.verdicts_D))
        if not verdicts_B.any():
            return batch
        for place in np.flatnonzero(verdicts_B).tolist():
            self._drop(batch[place], REASONS[verdicts_B[place]])
        return [text for text, verdict in zip(batch, verdicts_B.tolist(), strict=True) if not verdict]

    def close(self) -> Facts:
        """What was read, and what of it was dropped why."""
        if self.verdicts_D is not None and self.read["documents"] != len(self.verdicts_D):
            raise _changed(len(self.verdicts_D))
        return {
            "read": {"documents": self.read["documents"], "bytes": self.read["bytes"]},
            "dropped": {reason: dict(count) for reason, count in self.dropped.items()},
            "examples": self.examples,
        }

    def _drop(self, text: bytes, reason: str) -> None:
        count = self.dropped.setdefault(reason, Counter())
        if count["documents"] < report.EXAMPLES:
            begins = text[: 4 * report.LETTERS].decode(errors="ignore")[: report.LETTERS]
            self.examples.setdefault(reason, []).append(begins)
        count.update(documents=1, bytes=len(text))


def _changed(documents: int) -> DataError:
    return DataError(
        f"there are other documents now than the {documents} that were judged: a file was changed meanwhile. "
        f"Leave it alone, and run the same command again with --overwrite."
    )
