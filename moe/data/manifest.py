"""`manifest.json`: what a prepared data folder holds, where it came from, and the hash of every file."""

import json
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import xxhash
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from moe.errors import DataError
from moe.recipe import Section

MANIFEST_NAME = "manifest.json"
CHECKSUM_NAME = "manifest.json.xxh3"
"""The manifest's own hash, as `xxh128sum` writes it and `xxh128sum --check` reads it."""
FORMAT: Final = "turnout-tokens"
FORMAT_VERSION: Final = 1

Split = Literal["train", "validation"]
TokenType = Literal["uint16", "int32"]

BLOCK_BYTES: Final = 1 << 20
"""Of each so many bytes of a file its stamp has a hash of its own, so that damage is found to the block."""

_DIGITS = 16


def _stays_in_its_folder(name: str) -> str:
    if name in ("", ".", "..") or not {"/", "\\", "\0"}.isdisjoint(name):
        raise ValueError(f"{name!r} is no plain file name, and a data folder lists its own files only")
    return name


FileName = Annotated[str, AfterValidator(_stays_in_its_folder)]


class FileStamp(Section):
    """Size and hash of a file."""

    bytes: NonNegativeInt
    xxh3_128: str
    blocks: str | None = None
    """xxh3_64 of each `BLOCK_BYTES`, 16 hexadecimal digits a block end to end; null: made before there were any."""

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """Read all of `path`."""
        stamper = Stamper()
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                stamper.update(block)
        return stamper.close()

    def matches(self, other: "FileStamp") -> bool:
        """Whether both are of the same bytes."""
        return (self.bytes, self.xxh3_128) == (other.bytes, other.xxh3_128)

    def first_damage(self, found: "FileStamp") -> str:
        """Where `found` begins to differ from this, such as "block 3 (bytes 2097152 to 3145727)"; "" if unknown."""
        if self.blocks is None or found.blocks is None:
            return ""
        pairs = zip_longest(_cut(self.blocks), _cut(found.blocks))
        number = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
        if number is None:
            return ""
        first, last = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, max(self.bytes, found.bytes)) - 1
        return f"block {number + 1} (bytes {first} to {last})"


class Stamper:
    """Bytes as they are written -> the `FileStamp` of the file."""

    def __init__(self) -> None:
        self._whole = xxhash.xxh3_128()
        self._block = xxhash.xxh3_64()
        self._blocks: list[str] = []
        self._size = 0

    def update(self, data: bytes) -> None:
        self._whole.update(data)
        view = memoryview(data)
        while len(view):
            now, view = view[: (room := BLOCK_BYTES - self._size % BLOCK_BYTES)], view[room:]
            self._block.update(now)
            self._size += len(now)
            if self._size % BLOCK_BYTES == 0:
                self._end_block()

    def close(self) -> FileStamp:
        if self._size % BLOCK_BYTES:
            self._end_block()
        return FileStamp(bytes=self._size, xxh3_128=self._whole.hexdigest(), blocks="".join(self._blocks))

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block.reset()


def _cut(blocks: str) -> list[str]:
    return [blocks[at : at + _DIGITS] for at in range(0, len(blocks), _DIGITS)]


class Amount(Section):
    """So many documents with so many bytes of text."""

    documents: NonNegativeInt
    bytes: NonNegativeInt


class ShardFacts(Section):
    """One `.bin`/`.idx` pair."""

    name: FileName
    documents: NonNegativeInt
    tokens: NonNegativeInt
    bin: FileStamp
    idx: FileStamp
    mask: FileStamp | None = None
    """Which tokens the assistant wrote, where documents are conversations; null: they are text."""


class SplitFacts(Section):
    """The shards of `train` or `validation`, in order, and their totals; bytes are of UTF-8 text that is predicted."""

    documents: PositiveInt
    tokens: PositiveInt
    bytes: PositiveInt
    shards: list[ShardFacts]

    @model_validator(mode="after")
    def _totals_agree(self) -> "SplitFacts":
        totals = sum(s.documents for s in self.shards), sum(s.tokens for s in self.shards)
        if totals != (self.documents, self.tokens):
            raise ValueError(
                f"the shards hold {totals[0]} documents and {totals[1]} tokens, but the split says "
                f"{self.documents} and {self.tokens}"
            )
        return self


class TokenizerFacts(Section):
    """The tokenizer the shards were made with; `files` lie in the folder `tokenizer`."""

    vocab_size: PositiveInt
    """One more than the highest id."""
    eos_id: NonNegativeInt
    pad_id: NonNegativeInt
    files: dict[FileName, FileStamp]

    @model_validator(mode="after")
    def _special_tokens_are_tokens(self) -> "TokenizerFacts":
        for name, token in (("eos_id", self.eos_id), ("pad_id", self.pad_id)):
            if token >= self.vocab_size:
                raise ValueError(f"{name} is {token}, but ids must be below vocab_size, {self.vocab_size}")
        return self


class SourceFacts(Section):
    """What came from one source: read = kept + dropped, in documents and in bytes."""

    source: str
    digest: str | None
    """Hash of the names and contents of the files read; null where there are none to hash."""
    read: Amount
    kept: Amount
    dropped: dict[str, Amount]
    """By reason."""
    rewritten: int = 0
    """Bytes that cleaning added to texts, or took away if negative: read + rewritten = kept + dropped."""
    tokens: int | None = None
    """Of what was kept, with the ends of documents; null in folders made before they were counted by source."""


class Manifest(Section):
    """The whole page. Equal recipes on equal sources give an equal page."""

    format: Literal["turnout-tokens"] = FORMAT
    version: Literal[1] = FORMAT_VERSION
    recipe: dict[str, Any]
    dtype: TokenType
    tokenizer: TokenizerFacts
    splits: dict[Split, SplitFacts]
    sources: list[SourceFacts]
    given: dict[str, str] = Field(default_factory=dict)
    """Hashes of the other files that the recipe names, by path: test sets, lists, models."""

    @model_validator(mode="after")
    def _shards_are_of_one_kind(self) -> "Manifest":
        kinds = {shard.mask is None for facts in self.splits.values() for shard in facts.shards}
        if len(kinds) > 1:
            raise ValueError("some shards have a mask and others have none")
        return self

    @property
    def is_chat(self) -> bool:
        """Whether documents are conversations."""
        return any(shard.mask for facts in self.splits.values() for shard in facts.shards)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer and of all shards in order: equal fingerprints, equal tokens."""
        files = sorted((name, stamp.xxh3_128) for name, stamp in self.tokenizer.files.items())
        tokenizer = [files, self.tokenizer.vocab_size, self.tokenizer.eos_id, self.tokenizer.pad_id]
        shards = [
            (split, shard.bin.xxh3_128, shard.idx.xxh3_128, *([shard.mask.xxh3_128] if shard.mask else ()))
            for split, facts in sorted(self.splits.items())
            for shard in facts.shards
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps([tokenizer, shards]).encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read `folder/manifest.json`; raises `DataError` if it is missing, broken or of another version."""
        path = folder / MANIFEST_NAME
        try:
            page = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise DataError(
                f"{folder}: there is no {MANIFEST_NAME}, so this is not a complete data folder. "
                f"Give one made by `turnout prepare`, or run it again."
            ) from None
        except OSError as error:
            raise DataError(f"{path}: the manifest cannot be read ({error.strerror}).") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(
                f"{path}: this is not JSON ({error}). Run `turnout prepare` again, or copy the folder again."
            ) from None
        if not isinstance(page, dict) or page.get("format") != FORMAT:
            raise DataError(
                f"{path}: this is not a manifest of {FORMAT}. Give a folder made by `turnout prepare`."
            )
        if page.get("version") != FORMAT_VERSION:
            raise DataError(
                f"{path}: format version {page.get('version')!r}, but this turnout reads version {FORMAT_VERSION}. "
                f"Prepare the data again, or use the turnout that made it."
            )
        try:
            return cls.model_validate(page)
        except ValidationError as invalid:
            fault = invalid.errors(include_url=False)[0]
            where = ".".join(map(str, fault["loc"])) or "the page"
            raise DataError(
                f"{path}: {where}: {fault['msg'].removeprefix('Value error, ')}. The manifest was changed or damaged: "
                f"run `turnout prepare` again, or copy the folder again."
            ) from None

    def write(self, folder: Path) -> None:
        """Into `folder`, with its checksum beside it."""
        page = self.to_json().encode()
        (folder / CHECKSUM_NAME).write_text(f"{xxhash.xxh3_128_hexdigest(page)}  {MANIFEST_NAME}\n")
        (folder / MANIFEST_NAME).write_bytes(page)

    def to_json(self) -> str:
        """As `read` takes it."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def is_as_written(folder: Path) -> bool:
    """Whether the manifest has its checksum; also where there is none, as in folders made before there were any."""
    checksum = folder / CHECKSUM_NAME
    if not checksum.exists():
        return True
    found = xxhash.xxh3_128_hexdigest((folder / MANIFEST_NAME).read_bytes())
    return checksum.read_bytes() == f"{found}  {MANIFEST_NAME}\n".encode()
