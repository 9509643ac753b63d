"""Small texts and data folders for tests of the data road, and ways to run `prepare` and look at what it made."""

import gzip
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard
from click.testing import CliRunner, Result
from tokenizers import Tokenizer

from data_prep.run import command
from data_prep.splits import SplitWriter
from moe.data.shards import MANIFEST_NAME, Index, Manifest, Split, TokenData, TokenizerFacts, token_dtype

TEXTS = [
    f"Document {n} of the yard.\nTrain {n * 7 % 13} waits at the turnout; "
    f"signal {n % 5} is {'red' if n % 2 else 'green'}."
    for n in range(60)
]
PREPARED = "yard"


def page(folder: Path, sources: Sequence[Mapping[str, Any]], **settings: Any) -> dict[str, Any]:
    """A recipe of `sources` that puts a tokenizer of 300 tokens and its data into `folder`/yard."""
    return {
        "name": PREPARED,
        "output": str(folder / PREPARED),
        "sources": [dict(source) for source in sources],
        "tokenizer": {"type": "bpe", "vocab_size": 300},
        "validation": {"fraction": 0.2},
        **settings,
    }


def run(folder: Path, recipe: Mapping[str, Any] | str, *arguments: str) -> Result:
    """`turnout prepare` on this recipe, in this process."""
    path = folder / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(dict(recipe)), encoding="utf-8")
    return CliRunner().invoke(command, [str(path), *arguments])


def prepared(folder: Path, sources: Sequence[Mapping[str, Any]], **settings: Any) -> TokenData:
    """The data that a recipe of `sources` makes; fails if it does not."""
    result = run(folder, page(folder, sources, **settings))
    assert result.exit_code == 0, result.stderr
    return TokenData.open(folder / PREPARED, verify=True)


def texts_in(data: TokenData) -> dict[str, list[str]]:
    """Decoded documents by split, after a check that each has one end-of-document token, its last."""
    tokenizer = Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json"))
    found: dict[str, list[str]] = {}
    for split, facts in data.manifest.splits.items():
        start = 0
        for shard in facts.shards:
            for length in Index.read(data.folder / f"{shard.name}.idx").lengths_S:
                ids = data.tokens(split, start, start + int(length)).tolist()
                assert ids.index(data.eos_id) == len(ids) - 1
                found.setdefault(split, []).append(tokenizer.decode(ids[:-1], skip_special_tokens=False))
                start += int(length)
        assert start == data.num_tokens(split)
    return found


def all_texts(data: TokenData) -> list[str]:
    """Decoded documents of both splits, sorted."""
    return sorted(text for texts in texts_in(data).values() for text in texts)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_text(path: Path, text: bytes) -> Path:
    """Plain, .gz or .zst, by the name."""
    if path.suffix == ".gz":
        text = gzip.compress(text)
    elif path.suffix == ".zst":
        text = zstandard.compress(text)
    path.write_bytes(text)
    return path


def write_jsonl(path: Path, texts: Sequence[Any] = TEXTS, field: str = "text") -> Path:
    return write_text(path, "".join(json.dumps({field: text, "n": 1}) + "\n" for text in texts).encode())


def write_parquet(path: Path, texts: Sequence[Any] = TEXTS, field: str = "text", kind: Any = None) -> Path:
    pq.write_table(pa.table({field: pa.array(texts, type=kind), "n": [1] * len(texts)}), path)
    return path


def raw_data(
    folder: Path,
    splits: Mapping[Split, Sequence[Sequence[int]]],
    *,
    vocab_size: int,
    shard_tokens: int = 10**9,
) -> TokenData:
    """Shards of just these documents of ids, without a tokenizer; id 0 ends a document and 1 pads."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dtype, facts = token_dtype(vocab_size), {}
    for split, documents in splits.items():
        writer = SplitWriter(folder, split, dtype, shard_tokens)
        for ids in documents:
            writer.add(list(ids), num_bytes=len(ids))
        if (fact := writer.close()) is not None:
            facts[split] = fact
    tokenizer = TokenizerFacts(vocab_size=vocab_size, eos_id=0, pad_id=1, files={})
    manifest = Manifest(recipe={}, dtype=dtype, tokenizer=tokenizer, splits=facts, sources=[])
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return TokenData.open(folder, verify=True)


def refused(result: Result, *words: str) -> None:
    """One message, exit code 2, no traceback, and all of `words` in it."""
    assert result.exit_code == 2, (result.exit_code, result.stderr, result.exception)
    assert "Traceback" not in result.stderr
    message = result.stderr[result.stderr.index("error: ") :]
    assert "\nerror: " not in message
    assert not [word for word in words if word not in message], message


def cut(path: Path, keep: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


def flip(path: Path, at: int) -> Path:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0xFF
    path.write_bytes(bytes(raw))
    return path
