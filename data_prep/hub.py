"""A dataset of the Hugging Face Hub -> documents, as a stream."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from data_prep.documents import Document, Dropped, Source, from_text
from data_prep.recipe import HubSource
from moe.errors import DataError, TurnoutError


def hub(config: HubSource) -> Source:
    """Rows of one split, in the dataset's order."""
    return Source(f"hub {config.dataset} {config.split}", (), lambda: _documents(config))


def _documents(config: HubSource) -> Iterator[Document | Dropped]:
    import datasets  # seconds that other sources need not pay

    try:
        rows = datasets.load_dataset(
            config.dataset, config.config, split=config.split, revision=config.revision, streaming=True
        )
        for row in islice(rows, config.max_documents):
            yield from_text(_text(row, config))
    except TurnoutError:
        raise
    except Exception as error:  # whatever the library, the network or the dataset's own files raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(
            f"{config.dataset}: the dataset cannot be read ({reason}). Check its name, config, split and revision, "
            f"and the network; or download it and use a jsonl or parquet source."
        ) from None


def _text(row: dict[str, Any], config: HubSource) -> str | None:
    if config.text_field not in row:
        raise DataError(
            f"{config.dataset}: there is no column {config.text_field!r}, only {', '.join(map(repr, row))}. "
            f"Set the source's text_field."
        )
    value = row[config.text_field]
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"{config.dataset}: {config.text_field!r} is {value!r:.60}, but a document must be a string. "
            f"Set the source's text_field."
        )
    return value
