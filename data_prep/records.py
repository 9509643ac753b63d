"""A unit of work -> a folder of its files and a record, written last; a record that holds is work done.

STAGE/UNIT/...     the files
STAGE/UNIT.json    `Record`: what they were made from, their hashes, what the unit says of its work
"""

import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from pydantic import ValidationError

from moe.data.shards import FileStamp
from moe.errors import DataError
from moe.recipe import Section

Facts = dict[str, Any]


class Record(Section):
    """What a finished unit leaves."""

    key: str
    files: dict[str, FileStamp]
    facts: Facts


@dataclass(frozen=True)
class Unit:
    """`work` fills an empty folder and returns facts for the record; `key` hashes all that decides the result."""

    stage: Path
    name: str
    key: str
    work: Callable[[Path], Facts]

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.stage / self.name

    def __str__(self) -> str:
        return f"{self.stage.name} {self.name}"


def key(*parts: Any) -> str:
    """Hash of what JSON can say."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode())


def recorded(unit: Unit) -> Record | None:
    """The unit's record if it is of this key, without a look at the files."""
    try:
        record = Record.model_validate_json(_page(unit).read_bytes())
    except (OSError, ValidationError):
        return None
    return record if record.key == unit.key else None


def finished(unit: Unit) -> Record | None:
    """The unit's record if it is of this key and every byte of the files is as it says; None if it must be done."""
    record = recorded(unit)
    if record is None:
        return None
    for name, stamp in record.files.items():
        try:
            if not FileStamp.of(unit.folder / name).matches(stamp):
                return None
        except OSError:
            return None
    return record


def gate(units: Sequence[Unit]) -> list[Record]:
    """The records of all; raises `DataError` unless every unit is finished and every byte of it whole."""
    records = [finished(unit) for unit in units]
    if missing := [str(unit) for unit, record in zip(units, records, strict=True) if record is None]:
        raise DataError(
            f"{units[0].stage}: {len(missing)} of {len(units)} parts of this stage are missing or damaged, "
            f"{missing[0]} first, and what follows must not begin without them. Run the recipe again without --stage, "
            f"or with --stage {units[0].stage.name} first."
        )
    return [record for record in records if record is not None]


def do(unit: Unit) -> None:
    """Work in a folder of this process, move it to its place, then write the record.

    Nothing is synced: of what a power cut tears, the hashes will not hold, and the unit is done again.
    """
    unit.stage.mkdir(parents=True, exist_ok=True)
    _page(unit).unlink(missing_ok=True)
    workplace = scratch(unit, "files")
    shutil.rmtree(workplace, ignore_errors=True)
    workplace.mkdir()
    try:
        facts = unit.work(workplace)
        files = {path.name: FileStamp.of(path) for path in sorted(workplace.iterdir())}
        shutil.rmtree(unit.folder, ignore_errors=True)
        workplace.rename(unit.folder)
        page = scratch(unit, "json")
        page.write_text(Record(key=unit.key, files=files, facts=facts).model_dump_json(), encoding="utf-8")
        page.rename(_page(unit))
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def scratch(unit: Unit, kind: str) -> Path:
    """A name in the unit's stage of this process, on whatever machine, that `sweep` removes."""
    return unit.stage / f".{unit.name}.{socket.gethostname()}.{os.getpid()}.{kind}.unfinished"


def sweep(stage: Path) -> list[str]:
    """Remove what killed processes left unfinished; the names of their units."""
    left = sorted(stage.glob(".*.unfinished"))
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return sorted({path.name.split(".")[1] for path in left})


def _page(unit: Unit) -> Path:
    return unit.stage / f"{unit.name}.json"
