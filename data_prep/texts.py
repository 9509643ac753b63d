"""Some files of a source, or all of a source -> cleaned documents in parts, and an account of all that was read."""

import glob
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep import files
from data_prep.clean import cleaner
from data_prep.documents import Account, Document, Dropped, Source
from data_prep.hub import hub
from data_prep.parts import PartWriter
from data_prep.recipe import (
    ChatSource,
    DataRecipe,
    HubSource,
    JsonlSource,
    ParquetSource,
    StdlibSource,
    TextSource,
    WarcSource,
)
from data_prep.recipe import Source as SourceConfig
from data_prep.records import Facts
from data_prep.stdlib import stdlib
from data_prep.treatment import Clean
from data_prep.warc import warc
from moe.errors import DataError

QUARANTINE = "quarantine.jsonl"
_EXAMPLES = 5
_SAMPLE = 200


def open_source(config: SourceConfig, *, tolerant: bool = False) -> Source:
    """As the recipe describes it; with `tolerant`, rows that cannot be read are dropped rather than raised."""
    match config:
        case StdlibSource():
            return stdlib()
        case TextSource():
            return files.text(config)
        case JsonlSource():
            return files.jsonl(config, tolerant=tolerant)
        case ParquetSource():
            return files.parquet(config)
        case WarcSource():
            return warc(config)
        case HubSource():
            return hub(config)
        case ChatSource():
            return files.chat(config)


def open_sources(recipe: DataRecipe) -> list[Source]:
    """All of a recipe. Raises `DataError` for a file that two of them would read in the same way, or that it made."""
    sources = [open_source(config, tolerant=recipe.bad_rows == "quarantine") for config in recipe.sources]
    place = recipe.folder.resolve()
    made = (place, recipe.stages_folder) if place.name else ()  # the root is refused as such
    readers: dict[tuple[str, Path], int] = {}
    for number, (config, source) in enumerate(zip(recipe.sources, sources, strict=True)):
        way = repr(config.model_dump(exclude={"paths"}))
        for path in source.files:
            real = path.resolve()
            if not {real, *real.parents}.isdisjoint(made):
                raise DataError(
                    f"{path}: sources.{number} reads this file, but it lies in the recipe's own output, "
                    f"{recipe.folder}, or its stages: what is made would change what is read. Use narrower paths, or "
                    f"an output elsewhere."
                )
            if (other := readers.setdefault((way, real), number)) != number:
                raise DataError(
                    f"{path}: sources.{other} and sources.{number} both read this file, so its text would be there "
                    f"twice. Take it out of one of them; weights and epochs of a mixture show text more often."
                )
    return sources


def portions(
    config: SourceConfig, source: Source, num_bytes: int
) -> Iterator[tuple[SourceConfig, tuple[Path, ...]]]:
    """The source as sources of consecutive files, of `num_bytes` on disk or one file; whole, if it is not of files."""
    if not isinstance(config, TextSource | JsonlSource | ParquetSource | WarcSource):
        yield config, source.files
        return
    group: list[Path] = []
    size = 0
    for path in source.files:
        size += (more := path.stat().st_size)
        if group and size > num_bytes:
            yield _of(config, group), tuple(group)
            group, size = [], more
        group.append(path)
    if group:
        yield _of(config, group), tuple(group)


def _of(config: TextSource | JsonlSource | ParquetSource | WarcSource, group: Sequence[Path]) -> SourceConfig:
    return config.model_copy(update={"paths": [glob.escape(str(path)) for path in group]})


@dataclass(frozen=True)
class ReadAndClean:
    """The work of a unit: parts, and `quarantine.jsonl` of bad rows and of some examples for each other reason."""

    source: SourceConfig
    clean: Clean | None
    tolerant: bool
    part_bytes: int

    def __call__(self, folder: Path) -> Facts:
        writer = PartWriter(folder, self.part_bytes)
        try:
            facts = self.read(folder, writer.add)
            return {**facts, "parts": [part.model_dump() for part in writer.close()]}
        finally:
            writer.abandon()

    def read(self, folder: Path, keep: Callable[[bytes, int], None]) -> Facts:
        """Only the account, and the quarantine; UTF-8 and row of each document that stays go to `keep`."""
        source = open_source(self.source, tolerant=self.tolerant)
        clean = cleaner(self.clean)
        account, drops = Account(), _Drops()
        for row, item in enumerate(source.items()):
            account.reads(item)
            if isinstance(item, Dropped):
                drops.add(item, row, item.sample)
                continue
            now = clean(item)
            account.rewritten += now.num_bytes - item.num_bytes
            if isinstance(now, Dropped):
                account.drops(Document("", now.num_bytes), now.reason)
                drops.add(now, row, item.text[:_SAMPLE])
            else:
                account.keeps(now)
                keep(now.text.encode(), row)
        drops.write(folder / QUARANTINE)
        return {"account": account.close(source.name, None).model_dump()}


@dataclass
class _Drops:
    """Every row that could not be read, and the first few documents dropped for each other reason."""

    lines: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    def add(self, item: Dropped, row: int, sample: str) -> None:
        self.seen[item.reason] += 1
        if item.where or self.seen[item.reason] <= _EXAMPLES:
            page = {
                "reason": item.reason,
                "row": row,
                "where": item.where,
                "bytes": item.num_bytes,
                "begins": sample,
            }
            self.lines.append(json.dumps(page, ensure_ascii=True))

    def write(self, path: Path) -> None:
        path.write_text("".join(f"{line}\n" for line in self.lines), encoding="ascii")
