"""What the benchmark sets beside `turnout prepare`: files of JSON lines -> tokens or signatures, as others do it."""

import json
from collections.abc import Iterator, Sequence
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import shingles, vocabulary
from data_prep.encoder import Encoder
from data_prep.marks import bands
from data_prep.recipe import ExistingTokenizer
from data_prep.treatment import NearDuplicates
from moe.data.shards import PairWriter

_BATCH = 2048
_BATCH_BYTES = 4_000_000


def lines(path: Path) -> Iterator[list[str]]:
    """Texts, some megabytes at a time."""
    batch: list[str] = []
    size = 0
    with path.open("rb") as file:
        for line in file:
            batch.append(json.loads(line)["text"])
            size += len(line)
            if len(batch) >= _BATCH or size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _each(work: Any, files: Sequence[Path], workers: int) -> None:
    """An equal share of the files to each worker."""
    with get_context("fork").Pool(workers) as pool:
        pool.map(work, [files[worker::workers] for worker in range(workers)], chunksize=1)


def _encode_files(files: Sequence[Path], tokenizer: Path, folder: Path, fast: bool) -> None:
    encoder = Encoder(vocabulary.load(ExistingTokenizer(type="file", path=str(tokenizer))), fast=fast)
    for path in files:
        writer = PairWriter(folder / path.stem, "uint16")
        for batch in lines(path):
            found = encoder.encode([text.encode() for text in batch])
            writer.add_many(found.ids_N, found.lengths_D)
        writer.close()


def raw_fast(files: Sequence[Path], tokenizer: Path, folder: Path, workers: int) -> None:
    """No stages, no accounts: read, encode by gigatoken, write."""
    _each(partial(_encode_files, tokenizer=tokenizer, folder=folder, fast=True), files, workers)


def raw_reference(files: Sequence[Path], tokenizer: Path, folder: Path, workers: int) -> None:
    """The same by `tokenizers`."""
    _each(partial(_encode_files, tokenizer=tokenizer, folder=folder, fast=False), files, workers)


def datasets_map(files: Sequence[Path], tokenizer: Path, folder: Path, workers: int) -> None:
    """`datasets.map` with a tokenizer of transformers, as its tutorials do it."""
    import datasets
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    rows = datasets.load_dataset("json", data_files=[str(path) for path in files], split="train")
    rows.map(
        lambda batch: {"input_ids": encode(batch["text"])["input_ids"]},
        batched=True,
        num_proc=workers,
        remove_columns=["text"],
    ).save_to_disk(str(folder / "arrow"))


def megatron(files: Sequence[Path], tokenizer: Path, folder: Path, workers: int) -> None:
    """A pool that encodes line by line and one process that writes, as tools/preprocess_data.py of Megatron-LM is made.

    That script is in no package; its writer is, and writes here.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(len(_stock(tokenizer)))
    builder = IndexedDatasetBuilder(str(folder / "text_document.bin"), dtype=dtype)
    with get_context("fork").Pool(workers) as pool:
        for path in files:
            with path.open(encoding="utf-8") as file:
                for ids in pool.imap(partial(_encode_line, tokenizer=tokenizer), file, 32):
                    builder.add_document(ids, [len(ids)])
    builder.finalize(str(folder / "text_document.idx"))


def _encode_line(line: str, tokenizer: Path) -> list[int]:
    known = _stock(tokenizer)
    ids: list[int] = known(json.loads(line)["text"])["input_ids"]
    return [*ids, known.convert_tokens_to_ids(vocabulary.END_OF_TEXT)]


@cache
def _stock(tokenizer: Path) -> Any:
    """Once a process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)


def _datatrove(files: Sequence[Path], folder: Path, workers: int, *steps: Any) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader

    inputs = folder / "in"
    inputs.mkdir()
    for path in files:
        (inputs / path.name).symlink_to(path)
    LocalPipelineExecutor(
        [JsonlReader(str(inputs)), *steps],
        tasks=len(files),
        workers=workers,
        logging_dir=str(folder / "log"),
        start_method="fork",
    ).run()


def datatrove_tokens(files: Sequence[Path], tokenizer: Path, folder: Path, workers: int) -> None:
    """Tokenizer of datatrove, without its shuffle."""
    from datatrove.pipeline.tokens import DocumentTokenizer

    page = str(tokenizer / "tokenizer.json")
    step = DocumentTokenizer(
        str(folder / "tokens"), page, eos_token=vocabulary.END_OF_TEXT, shuffle_documents=False, seed=0
    )
    _datatrove(files, folder, workers, step)


def marks(files: Sequence[Path], tokenizer: Path, folder: Path, workers: int) -> None:
    """Our bands of the same documents, reading JSON as the others do."""
    _each(partial(_mark_files, folder=folder), files, workers)


def _mark_files(files: Sequence[Path], folder: Path) -> None:
    known, config = shingles.WordHashes(), NearDuplicates()
    for path in files:
        found = []
        for batch in lines(path):
            words_W, bounds_T = shingles.hashed((shingles.split(text) for text in batch), known)
            found.append(bands(words_W, bounds_T, config))
        np.save(folder / f"{path.stem}.npy", np.concatenate(found, axis=1))


def _sha1() -> Any:
    """The default is xxhash by strings, which xxhash 4 refuses and this project needs."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    return MinhashConfig(hash_config=HashConfig(precision=64, hash_fc="sha1"))


def datatrove_signatures(files: Sequence[Path], tokenizer: Path, folder: Path, workers: int) -> None:
    """MinHash signatures of datatrove as they are by default, for English."""
    from datatrove.pipeline.dedup import MinhashDedupSignature

    _datatrove(files, folder, workers, MinhashDedupSignature(str(folder / "signatures"), _sha1()))


def datatrove_signatures_fast(files: Sequence[Path], tokenizer: Path, folder: Path, workers: int) -> None:
    """The same with our words instead of spaCy's."""
    from datatrove.pipeline.dedup import MinhashDedupSignature

    from data_prep.words import Words

    _datatrove(
        files, folder, workers, MinhashDedupSignature(str(folder / "signatures"), _sha1(), language=Words())
    )  # type: ignore[arg-type,unused-ignore]  # it takes words too
