"""A dataset of the Hugging Face Hub -> documents, as a stream."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.documents import Document, Dropped, Source, from_text
from data_prep.recipe import HubSource
from moe.errors import DataError, TurnoutError


def hub(config: HubSource) -> Source:
    """Rows of one split, in the dataset's order; of a folder here the files are known, so that a change is seen."""
    return Source(
        f"hub {config.dataset} {config.split}", _files(Path(config.dataset)), lambda: _documents(config)
    )


def _files(folder: Path) -> tuple[Path, ...]:
    if not folder.is_dir():
        return ()
    found = (path for path in folder.rglob("*") if path.is_file())
    return tuple(
        sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    )


def _documents(config: HubSource) -> Iterator[Document | Dropped]:
    import datasets  # seconds that other sources need not pay

    try:
        rows = datasets.load_dataset(
            config.dataset, config.config, split=config.split, revision=config.revision, streaming=True
        )
        for row in islice(rows, config.max_documents):
            url = _string(row, config, config.url_field, "url_field") if config.url_field else None
            yield from_text(_string(row, config, config.text_field, "text_field"), url or "")
    except TurnoutError:
        raise
    except Exception as error:  # whatever the library, the network or the dataset's own files raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(
            f"{config.dataset}: the dataset cannot be read ({reason}). Check its name, config, split and revision, "
            f"and the network; or download it and use a jsonl or parquet source."
        ) from None


def _string(row: dict[str, Any], config: HubSource, name: str, setting: str) -> str | None:
    if name not in row:
        raise DataError(
            f"{config.dataset}: there is no column {name!r}, only {', '.join(map(repr, row))}. "
            f"Set the source's {setting}."
        )
    value = row[name]
    if value is not None and not isinstance(value, str):
        what = "a document" if setting == "text_field" else "an address"
        raise DataError(
            f"{config.dataset}: {name!r} is {value!r:.60}, but {what} must be a string. Set the source's {setting}."
        )
    return value
