"""A folder made by `turnout prepare` -> token ids of a split, checked against its manifest.

FOLDER/manifest.json              what there is, with the hash of every file
FOLDER/train-00000.bin .idx ...   Megatron pairs; `validation-...` likewise
FOLDER/train-00000.mask           of conversations: which tokens the assistant wrote
FOLDER/tokenizer/                 a Hugging Face tokenizer folder
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moe.data.indexed import Index, PairWriter, Tokens, open_tokens, token_dtype
from moe.data.manifest import (
    MANIFEST_NAME,
    Amount,
    FileStamp,
    Manifest,
    ShardFacts,
    SourceFacts,
    Split,
    SplitFacts,
    TokenizerFacts,
)
from moe.data.masks import MaskWriter, mask_path
from moe.data.tape import Tape
from moe.errors import DataError

__all__ = [
    "MANIFEST_NAME",
    "TOKENIZER_NAME",
    "Amount",
    "FileStamp",
    "Index",
    "Manifest",
    "MaskWriter",
    "PairWriter",
    "ShardFacts",
    "SourceFacts",
    "Split",
    "SplitFacts",
    "TokenData",
    "TokenizerFacts",
    "Tokens",
    "token_dtype",
]

TOKENIZER_NAME = "tokenizer"
_NOTHING = Tape([])


@dataclass(frozen=True)
class TokenData:
    """A data folder whose files are all there. Splits are `train` and `validation`; one without text is empty."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path, verify: bool) -> "TokenData":
        """Open `folder`. Sizes and index headers are always checked, every byte's hash with `verify`.

        Raises `DataError`: no folder, no manifest or a broken one, a file missing, cut or changed.
        """
        folder = Path(folder)
        if not os.path.isdir(folder):  # noqa: PTH112  unlike Path's, it never raises
            raise DataError(
                f"{folder}: there is no such folder. Make it with `turnout prepare`, or mend the path."
            )
        manifest = Manifest.read(folder)
        for name, stamp in manifest.tokenizer.files.items():
            _check_file(folder / TOKENIZER_NAME / name, stamp, verify)
        for split in manifest.splits.values():
            for shard in split.shards:
                _check_shard(folder, shard, manifest.dtype, verify)
        return cls(folder, manifest)

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return self.manifest.tokenizer.vocab_size

    @property
    def eos_id(self) -> int:
        """The token at the end of every document."""
        return self.manifest.tokenizer.eos_id

    @property
    def pad_id(self) -> int:
        """The token that fills rows; it is never predicted."""
        return self.manifest.tokenizer.pad_id

    @property
    def is_chat(self) -> bool:
        """Whether documents are conversations, of which only what the assistant wrote is predicted."""
        return self.manifest.is_chat

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokens and tokenizer, wherever the folder lies; 32 hexadecimal digits."""
        return self.manifest.fingerprint

    @property
    def tokenizer_folder(self) -> Path:
        """A folder that `AutoTokenizer.from_pretrained` reads."""
        return self.folder / TOKENIZER_NAME

    def num_tokens(self, split: str) -> int:
        """Tokens of all documents, ends of documents included; 0 for a split without text."""
        facts = self._facts(split)
        return facts.tokens if facts else 0

    def longest_conversation(self) -> int | None:
        """Tokens of the longest in any split; None where documents are text."""
        if not self.is_chat:
            return None
        shards = [shard.name for facts in self.manifest.splits.values() for shard in facts.shards]
        return max(int(np.max(Index.read(self.folder / f"{name}.idx").lengths_S)) for name in shards)

    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of the text that is predicted: of all documents, or of what the assistant wrote in them."""
        facts = self._facts(split)
        return facts.bytes if facts else 0

    def num_documents(self, split: str) -> int:
        """Documents in the split."""
        facts = self._facts(split)
        return facts.documents if facts else 0

    def document_lengths(self, split: str) -> np.typing.NDArray[np.int64]:
        """Tokens of each document, in order. Raises `DataError` if they are not what their shards hold."""
        facts = self._facts(split)
        lengths = [_lengths(self.folder, shard) for shard in ([] if facts is None else facts.shards)]
        return np.concatenate([np.zeros(0, dtype=np.int64), *lengths]).astype(np.int64)

    def tokens(self, split: str, start: int, stop: int) -> Tokens:
        """Ids `[stop - start]`, uint16 or int32, of the split's documents end to end, across shards.

        Read-only memory of the file where one shard holds them all, else a copy. Raises `IndexError` unless
        0 <= start <= stop <= num_tokens(split), and `DataError` for an id that the vocabulary does not have.
        """
        tape = self._tapes.get(split, _NOTHING)
        if not 0 <= start <= stop <= len(tape):
            raise IndexError(f"tokens {start} to {stop} of {split}, which has {len(tape)} tokens")
        parts = tape.views(start, stop)
        if not parts:
            return np.empty(0, dtype=self.manifest.dtype)
        ids_N = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self._check_ids(split, start, ids_N)
        return ids_N

    def pieces(self, split: str, starts: Sequence[int], lengths: Sequence[int]) -> Tokens:
        """Ids `[sum(lengths)]`: what lies from each start on, end to end. Raises as `tokens` does."""
        ids_N = self._tapes[split].pieces(starts, lengths)
        if _largest(ids_N) >= self._vocab_size:
            for start, length in zip(starts, lengths, strict=True):
                self.tokens(split, start, start + length)  # says which it is
        return ids_N

    def _check_ids(self, split: str, start: int, ids_N: Tokens) -> None:
        # Bytes whose hash nobody checked, or an edited manifest, would end as an index error deep in the model.
        if len(ids_N) and _largest(ids_N) >= self._vocab_size:
            at = int((_unsigned(ids_N) >= self.vocab_size).argmax())
            raise DataError(
                f"{self.folder}: token {start + at} of the {split} split has id {int(ids_N[at])}, but the manifest's "
                f"vocabulary has {self.vocab_size} tokens, from 0 on. The shards or the manifest were changed or "
                f"damaged: prepare the data again, or copy it again."
            )

    @cached_property
    def _vocab_size(self) -> int:
        return self.vocab_size  # asked for with every row

    def _facts(self, split: str) -> SplitFacts | None:
        return next((facts for name, facts in self.manifest.splits.items() if name == split), None)

    @cached_property
    def _tapes(self) -> dict[str, Tape]:
        dtype = self.manifest.dtype
        return {
            split: Tape([open_tokens(self.folder / f"{shard.name}.bin", dtype) for shard in facts.shards])
            for split, facts in self.manifest.splits.items()
        }

    def __reduce__(self) -> tuple[type["TokenData"], tuple[Path, Manifest]]:
        """Pickle the path, not the memory behind it: a spawned process opens the files itself."""
        return TokenData, (self.folder, self.manifest)


def _largest(ids_N: Tokens) -> Any:
    return np.maximum.reduce(_unsigned(ids_N), axis=None)


def _unsigned(ids_N: Tokens) -> Tokens:
    """So that a negative id is a large one."""
    return ids_N.view("<u4") if ids_N.itemsize == 4 else ids_N


def _check_shard(folder: Path, shard: ShardFacts, dtype: str, verify: bool) -> None:
    bin_path, idx_path = folder / f"{shard.name}.bin", folder / f"{shard.name}.idx"
    _check_file(bin_path, shard.bin, verify)
    _check_file(idx_path, shard.idx, verify)
    if shard.mask is not None:
        _check_file(mask_path(folder / shard.name), shard.mask, verify)
        if shard.mask.bytes != shard.tokens:
            raise DataError(
                f"{mask_path(folder / shard.name)}: the manifest gives it {shard.mask.bytes} bytes for {shard.tokens} "
                f"tokens, but each has one. Prepare the data again."
            )
    index = Index.read(idx_path)
    said = (index.dtype, len(index.documents_D) - 1, index.num_bytes)
    true = (dtype, shard.documents, shard.bin.bytes)
    if said != true or shard.tokens * np.dtype(dtype).itemsize != shard.bin.bytes:
        raise DataError(
            f"{idx_path}: it describes {said[1]} documents in {said[2]} bytes of {said[0]}, but {bin_path.name} "
            f"and the manifest hold {true[1]} in {true[2]} bytes of {true[0]}. Prepare the data again."
        )
    if verify:
        index.check(idx_path)


def _lengths(folder: Path, shard: ShardFacts) -> np.typing.NDArray[np.int32]:
    path = folder / f"{shard.name}.idx"
    lengths_S = np.asarray(Index.read(path).lengths_S)
    if lengths_S.min(initial=0) < 0 or lengths_S.sum(dtype=np.int64) != shard.tokens:
        raise DataError(
            f"{path}: its documents have {lengths_S.sum(dtype=np.int64)} tokens, but the manifest says {shard.tokens}. "
            f"The file was changed or damaged: prepare the data again, or copy it again."
        )
    return lengths_S


def _check_file(path: Path, stamp: FileStamp, verify: bool) -> None:
    try:
        size = path.stat().st_size
        found = FileStamp.of(path) if verify and size == stamp.bytes else None
    except FileNotFoundError:
        raise DataError(
            f"{path}: the manifest lists this file, but it is missing. Prepare the data again, or copy it again."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror}).") from None
    if size != stamp.bytes:
        raise DataError(
            f"{path}: {size} bytes, but the manifest says {stamp.bytes}. The file is cut or was changed: "
            f"prepare the data again, or copy it again."
        )
    if found is not None and not found.matches(stamp):
        where = stamp.first_damage(found)
        raise DataError(
            f"{path}: its hash is {found.xxh3_128}, but the manifest says {stamp.xxh3_128}"
            f"{f'; {where} differs' if where else ''}. The file was changed "
            f"or damaged: prepare the data again, or copy it again."
        )
