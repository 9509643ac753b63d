"""Counts as they grow: a live line on a terminal, a sentence now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from data_prep.documents import Document, Dropped
from data_prep.records import Unit
from moe import log

_SECONDS_BETWEEN_SENTENCES = 10.0

ItemT = TypeVar("ItemT", bound=Document | Dropped)


def watched(items: Iterable[ItemT], what: str) -> Iterator[ItemT]:
    """The same items; `what` begins the sentence, such as "encoding stdlib"."""
    return _live(items, what) if sys.stderr.isatty() else _told(items, what)


def parts(units: Iterable[Unit], total: int, stage: str) -> Iterator[Unit]:
    """The same units of a stage as they end: a bar on a terminal, sentences elsewhere."""
    if sys.stderr.isatty():
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(stage, total=total)
            for unit in units:
                bar.advance(task)
                yield unit
        return
    spoke = time.monotonic()
    for number, unit in enumerate(units, start=1):
        if number == total or time.monotonic() - spoke > _SECONDS_BETWEEN_SENTENCES:
            spoke = time.monotonic()
            log.get().info("%s: %d of %d parts done", stage, number, total)
        yield unit


def _live(items: Iterable[ItemT], what: str) -> Iterator[ItemT]:
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        for number, num_bytes, item in _counted(items):
            progress.update(task, description=_sentence(what, number, num_bytes))
            yield item


def _told(items: Iterable[ItemT], what: str) -> Iterator[ItemT]:
    spoke = time.monotonic()
    for number, num_bytes, item in _counted(items):
        if time.monotonic() - spoke > _SECONDS_BETWEEN_SENTENCES:
            spoke = time.monotonic()
            log.get().info("%s", _sentence(what, number, num_bytes))
        yield item


def _counted(items: Iterable[ItemT]) -> Iterator[tuple[int, int, ItemT]]:
    num_bytes = 0
    for number, item in enumerate(items, start=1):
        num_bytes += item.num_bytes
        yield number, num_bytes, item


def _sentence(what: str, number: int, num_bytes: int) -> str:
    return f"{what}: {number:,} documents, {num_bytes / 1e6:,.1f} MB"
