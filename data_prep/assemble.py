"""What the stages made -> the data folder: shards in the order of the text, tokenizer, accounts, manifest."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep import documents, given, report
from data_prep.encoding import SPLITS
from data_prep.prepare import check_splits
from data_prep.recipe import DataRecipe
from data_prep.records import Record, Unit
from data_prep.texts import QUARANTINE
from moe.data.shards import (
    TOKENIZER_NAME,
    Amount,
    Manifest,
    ShardFacts,
    SourceFacts,
    Split,
    SplitFacts,
    TokenizerFacts,
    token_dtype,
)
from moe.errors import DataError

_COUNTED = ("documents", "bytes")


@dataclass(frozen=True)
class Made:
    """The units of the stages with their records, and the number of the source that each is of."""

    tokenizer: Unit
    tokens: Record
    texts: Sequence[tuple[Unit, Record, int]]
    encoded: Sequence[tuple[Unit, Record, int]]


def assemble(
    recipe: DataRecipe, sources: Sequence[tuple[str, str | None]], made: Made, folder: Path
) -> Manifest:
    """Fill `folder`, by hard links where they can be; `sources` are (name, digest) each.

    Raises `DataError` if an account does not balance.
    """
    tokenizer = TokenizerFacts.model_validate(made.tokens.facts["tokenizer"])
    (folder / TOKENIZER_NAME).mkdir()
    for name in made.tokens.files:
        _link(made.tokenizer.folder / name, folder / TOKENIZER_NAME / name)
    splits = {split: _split(split, made, folder) for split in SPLITS}
    accounts = [_account(number, *source, made) for number, source in enumerate(sources)]
    with (folder / QUARANTINE).open("wb") as quarantine:
        for unit, _, _ in made.texts:
            quarantine.write((unit.folder / QUARANTINE).read_bytes())
    check_splits(recipe, splits, accounts)
    manifest = Manifest(
        recipe=recipe.identity,
        dtype=token_dtype(tokenizer.vocab_size),
        tokenizer=tokenizer,
        splits={split: facts for split, facts in splits.items() if facts},
        sources=accounts,
        given=given.digests(recipe),
    )
    kept = sum(source.kept.documents for source in accounts)
    written = sum(facts.documents for facts in manifest.splits.values())
    if kept != written:
        raise DataError(
            f"{kept} documents were kept, but {written} are in the shards: this is a fault of turnout."
        )
    manifest.write(folder)
    report.write(folder, report.merged(record.facts["examples"] for _, record, _ in made.encoded))
    return manifest


def _split(split: Split, made: Made, folder: Path) -> SplitFacts | None:
    parts = [
        (unit, SplitFacts.model_validate(record.facts["splits"][split]))
        for unit, record, _ in made.encoded
        if split in record.facts["splits"]
    ]
    shards: list[ShardFacts] = []
    for unit, facts in parts:
        for shard in facts.shards:
            name = f"{split}-{len(shards):05d}"
            for suffix in (".bin", ".idx"):
                _link(unit.folder / f"{shard.name}{suffix}", folder / f"{name}{suffix}")
            shards.append(shard.model_copy(update={"name": name}))
    if not shards:
        return None
    return SplitFacts(
        documents=sum(facts.documents for _, facts in parts),
        tokens=sum(facts.tokens for _, facts in parts),
        bytes=sum(facts.bytes for _, facts in parts),
        shards=shards,
    )


def _account(number: int, name: str, digest: str | None, made: Made) -> SourceFacts:
    """What was read, and what became of it in the text stage and by the verdicts."""
    accounts = [
        SourceFacts.model_validate(record.facts["account"]) for _, record, of in made.texts if of == number
    ]
    clean = documents.add(accounts, name, digest)
    ends = [record.facts for _, record, of in made.encoded if of == number]
    read = Amount(**{unit: sum(end["read"][unit] for end in ends) for unit in _COUNTED})
    if read != clean.kept:
        raise DataError(
            f"{clean.source}: {clean.kept} left the text stage, but {read} reached the encoder: this is a fault of "
            f"turnout."
        )
    verdicts = SourceFacts(
        source=clean.source,
        digest=digest,
        read=read,
        kept=Amount(**{unit: sum(end["kept"][unit] for end in ends) for unit in _COUNTED}),
        dropped={
            reason: Amount(
                **{
                    unit: sum(end["dropped"].get(reason, {}).get(unit, 0) for end in ends)
                    for unit in _COUNTED
                }
            )
            for reason in sorted({reason for end in ends for reason in end["dropped"]})
        },
    )
    return clean.model_copy(
        update={
            "kept": verdicts.kept,
            "dropped": {**clean.dropped, **verdicts.dropped},
            "tokens": sum(split["tokens"] for end in ends for split in end["splits"].values()),
        }
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
