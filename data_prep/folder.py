"""A data folder -> every damage in it, by file and block; its figures; some of its documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe.data.manifest import CHECKSUM_NAME, MANIFEST_NAME, is_as_written
from moe.data.shards import TOKENIZER_NAME, FileStamp, Manifest, ShardFacts, TokenData
from moe.errors import DataError


def damages(folder: Path) -> Iterator[str]:
    """A sentence for each file that is missing, cut or changed. Raises `DataError` without a manifest."""
    manifest = Manifest.read(folder)
    try:
        if not is_as_written(folder):
            yield (
                f"{folder / MANIFEST_NAME}: other bytes than {CHECKSUM_NAME} says, so that what it says of the files "
                f"below is in doubt too"
            )
    except OSError as error:
        yield f"{error.filename}: it cannot be read ({error.strerror})"
    for path, stamp in _files(folder, manifest):
        try:
            found = FileStamp.of(path)
        except OSError as error:
            yield f"{path}: it cannot be read ({error.strerror})"
            continue
        if found.matches(stamp):
            continue
        where = stamp.first_damage(found)
        what = f"{found.bytes} bytes of {stamp.bytes}" if found.bytes != stamp.bytes else "other bytes"
        yield f"{path}: {what}{f', from {where} on' if where else ''}"


def shares(data: TokenData) -> dict[str, Any]:
    """Figures of a folder for `stats`: splits, lengths of documents, sources and what was dropped from them."""
    page: dict[str, Any] = {"vocabulary": data.vocab_size, "splits": {}, "sources": []}
    for split in data.manifest.splits:
        lengths_D = data.document_lengths(split)
        edges = [0, *(2**power for power in range(4, 21, 2)), int(max(lengths_D.max(), 2**20)) + 1]
        counts, _ = np.histogram(lengths_D, bins=np.unique(edges))
        page["splits"][split] = {
            "documents": data.num_documents(split),
            "tokens": data.num_tokens(split),
            "bytes": data.num_bytes(split),
            "bytes per token": round(data.num_bytes(split) / data.num_tokens(split), 3),
            "tokens of a document": {
                "median": int(np.median(lengths_D)),
                "mean": round(float(lengths_D.mean()), 1),
                "longest": int(lengths_D.max()),
            },
            "documents shorter than": {
                str(int(edge)): int(n) for edge, n in zip(np.unique(edges)[1:], counts, strict=True) if n
            },
        }
    page["sources"] = [source.model_dump(mode="json") for source in data.manifest.sources]
    return page


def sample(data: TokenData, split: str, count: int, seed: int) -> Iterator[tuple[int, str]]:
    """(number, text) of `count` documents of the split, drawn by `seed`, in their order."""
    from tokenizers import Tokenizer

    total = data.num_documents(split)
    if not total:
        raise DataError(
            f"{data.folder}: there is no {split} split. Use one of {', '.join(data.manifest.splits)}."
        )
    path = data.tokenizer_folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise DataError(
            f"{path}: the tokenizer cannot be read ({error}), so there is no text to show. `turnout data verify` says "
            f"what else is damaged; copy the folder again, or prepare the data again."
        ) from None
    starts_D = np.concatenate([[0], np.cumsum(data.document_lengths(split))])
    chosen = np.random.default_rng(seed).choice(total, size=min(count, total), replace=False)
    for document in sorted(int(number) for number in chosen):
        ids_N = data.tokens(split, int(starts_D[document]), int(starts_D[document + 1]))
        yield document, tokenizer.decode([token for token in ids_N.tolist() if token != data.eos_id])


def _files(folder: Path, manifest: Manifest) -> Iterator[tuple[Path, FileStamp]]:
    for name, stamp in manifest.tokenizer.files.items():
        yield folder / TOKENIZER_NAME / name, stamp
    for facts in manifest.splits.values():
        for shard in facts.shards:
            yield from _pair(folder, shard)


def _pair(folder: Path, shard: ShardFacts) -> Iterator[tuple[Path, FileStamp]]:
    yield folder / f"{shard.name}.bin", shard.bin
    yield folder / f"{shard.name}.idx", shard.idx
    if shard.mask is not None:
        yield folder / f"{shard.name}.mask", shard.mask
