"""Our `.bin` and `.idx` files beside those that Megatron-Core writes of the same documents."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from moe.data.indexed import PairWriter, token_dtype


@pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None,
    reason="megatron-core is not installed: pip install --no-deps megatron-core",
)
@pytest.mark.parametrize("vocab_size", [1000, 65_499, 65_500, 200_000])
def test_the_bytes_are_those_of_megatron(vocab_size: int, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    generator = np.random.default_rng(vocab_size)
    documents = [generator.integers(0, vocab_size, length) for length in generator.integers(1, 300, 200)]
    dtype = DType.optimal_dtype(vocab_size)
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        theirs.add_document(document.tolist(), [len(document)])
    theirs.finalize(str(tmp_path / "theirs.idx"))
    ours = PairWriter(tmp_path / "ours", token_dtype(vocab_size))
    for document in documents[:100]:
        ours.add(document)
    ours.add_many(np.concatenate(documents[100:]), np.array([len(document) for document in documents[100:]]))
    ours.close()
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()
