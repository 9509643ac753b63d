"""Every knob of a preparation: sources, tokenizer, validation split, shards."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from data_prep.treatment import Clean, Decontaminate, Duplicates, Executor, NonEmpty, Patterns
from moe.recipe import PathText, Section


class StdlibSource(Section):
    """The installed Python's own sources, without tests, and its documentation topics: text on any machine."""

    type: Literal["stdlib"]


class TextSource(Section):
    """Plain text files, also .gz and .zst."""

    type: Literal["text"]
    paths: Patterns
    """Files or glob patterns, from the working folder; ** matches folders within folders."""
    separator: NonEmpty | None = None
    """Text between two documents of one file; null: a file is a document."""


class JsonlSource(Section):
    """One JSON object a line, also .gz and .zst."""

    type: Literal["jsonl"]
    paths: Patterns
    """Files or glob patterns, from the working folder; ** matches folders within folders."""
    text_field: NonEmpty = "text"
    """Key of the text in each object."""
    url_field: NonEmpty | None = None
    """Key of the address where the text was found, for clean.urls; null: none is read."""


class ParquetSource(Section):
    """One document a row."""

    type: Literal["parquet"]
    paths: Patterns
    """Files or glob patterns, from the working folder; ** matches folders within folders."""
    text_field: NonEmpty = "text"
    """Column of the text."""
    url_field: NonEmpty | None = None
    """Column of the address where the text was found, for clean.urls; null: none is read."""


class WarcSource(Section):
    """Records of plain text in WARC files, such as Common Crawl's WET files, also .gz and .zst."""

    type: Literal["warc"]
    paths: Patterns
    """Files or glob patterns, from the working folder; ** matches folders within folders."""
    html: bool = False
    """Pages in HTML too: what trafilatura takes for their text. false: they are dropped."""


class HubSource(Section):
    """A dataset of the Hugging Face Hub, or a folder that `datasets` can load, read as a stream."""

    type: Literal["hub"]
    dataset: NonEmpty
    """Name on the Hub such as roneneldan/TinyStories, or a local folder."""
    config: NonEmpty | None = None
    """Configuration of the dataset; null: its only one."""
    split: NonEmpty = "train"
    """Split of the dataset to read."""
    revision: NonEmpty | None = None
    """Commit, tag or branch; null: the newest."""
    text_field: NonEmpty = "text"
    """Column of the text."""
    url_field: NonEmpty | None = None
    """Column of the address where the text was found, for clean.urls; null: none is read."""
    max_documents: PositiveInt | None = None
    """Rows to read from the beginning; null: all."""


class ChatSource(Section):
    """Conversations, one JSON object a line, also .gz and .zst: {"messages": [{"role": ..., "content": ...}, ...]}.

    They become tokens by the chat template of the tokenizer, and only what the assistant wrote is predicted.
    """

    type: Literal["chat"]
    paths: Patterns
    """Files or glob patterns, from the working folder; ** matches folders within folders."""
    messages_field: NonEmpty = "messages"
    """Key of the list of messages in each object."""
    max_tokens: Annotated[int, Field(ge=2, le=2**31 - 1)] | None = None
    """Drop conversations of more tokens, since none is ever cut; null: keep all."""


Source = Annotated[
    StdlibSource | TextSource | JsonlSource | ParquetSource | WarcSource | HubSource | ChatSource,
    Field(discriminator="type"),
]


class BpeTokenizer(Section):
    """A byte-level BPE trained on the documents themselves; every string survives encoding and decoding."""

    type: Literal["bpe"]
    vocab_size: Annotated[int, Field(ge=259, le=1_000_000)]
    """Tokens in all: 256 bytes, <|endoftext|>, <|pad|>, and at least one merge."""
    min_frequency: Annotated[int, Field(ge=1, le=1_000_000_000)] = 2
    """How often a pair must occur to be merged."""
    sample_megabytes: PositiveInt = 32
    """Text to train on, in 10^6 bytes: an equal share from the beginning of each source."""
    fast: bool = True
    """Encode by gigatoken where it gives the same ids; false: always by tokenizers."""


class ExistingTokenizer(Section):
    """A tokenizer made before."""

    type: Literal["file"]
    path: PathText
    """A tokenizer.json, or a Hugging Face folder that holds one."""
    eos_token: NonEmpty | None = None
    """Token that ends a document; null: what tokenizer_config.json says, or <|endoftext|>."""
    pad_token: NonEmpty | None = None
    """Token that fills rows; null: what tokenizer_config.json says, or the end of a document."""
    fast: bool = True
    """Encode by gigatoken where it gives the same ids; false: always by tokenizers."""


Tokenizer = Annotated[BpeTokenizer | ExistingTokenizer, Field(discriminator="type")]


class ValidationSplit(Section):
    fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    """Share of documents held out, each by a hash of its text: equal documents go together, order is nothing."""
    seed: NonNegativeInt = 0
    """Another seed holds out other documents."""

    @model_validator(mode="after")
    def _seed_has_an_effect(self) -> "ValidationSplit":
        if self.seed and not self.fraction:
            raise ValueError(f"seed {self.seed} has no effect with fraction 0; remove one of them")
        return self


class DataRecipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The data's name: letters, digits, dot, dash, underscore."""
    output: PathText | None = None
    """The data's folder; null: data/NAME."""
    sources: Annotated[list[Source], Field(min_length=1)]
    """Where text comes from, in this order."""
    tokenizer: Tokenizer
    """How text becomes tokens."""
    validation: ValidationSplit = ValidationSplit()
    """What is held out from training."""
    shard_tokens: PositiveInt = 100_000_000
    """A shard ends with the document that brings it to so many tokens."""
    clean: Clean | None = None
    """What each document must pass; null: nothing but being text."""
    duplicates: Duplicates | None = None
    """Which copies are dropped; null: none."""
    decontaminate: Decontaminate | None = None
    """Whose test texts are kept out; null: none."""
    bad_rows: Literal["stop", "quarantine"] = "stop"
    """What a row that is no JSON or has no text does: end the work, or go into quarantine.jsonl and be counted."""
    part_megabytes: PositiveInt = 64
    """Text of a part, in 10^6 bytes: parts are made side by side, each with its shards, when work is in stages."""
    executor: Executor | None = None
    """Who works on the parts; null: this process alone, or all cores where a setting above needs stages."""

    @field_validator("executor", mode="before")
    @classmethod
    def _local_unless_said(cls, block: Any) -> Any:
        return {"type": "local", **block} if isinstance(block, dict) else block

    @property
    def is_staged(self) -> bool:
        """Whether the work is done in stages, part by part."""
        asked = (self.clean, self.duplicates, self.decontaminate, self.executor)
        return any(asked) or self.bad_rows == "quarantine"

    @property
    def is_judged(self) -> bool:
        """Whether all documents must have been seen before it is known which of them stay."""
        return self.duplicates is not None or self.decontaminate is not None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the tokens: the recipe but for where they go, how fast, and settings without effect."""
        page = self.model_dump(mode="json", exclude={"output": True, "executor": True, "tokenizer": {"fast"}})
        without_effect = {"clean": None, "duplicates": None, "decontaminate": None, "bad_rows": "stop"}
        page = {key: value for key, value in page.items() if without_effect.get(key, page) != value}
        for block in (*page["sources"], page.get("clean", {})):
            for key, value in (("url_field", None), ("html", False), ("urls", None)):
                if block.get(key, block) == value:
                    del block[key]
        if not self.is_staged:
            del page["part_megabytes"]
        return page

    @model_validator(mode="after")
    def _conversations_stay_as_they_are(self) -> "DataRecipe":
        if self.is_chat and self.is_staged:
            raise ValueError(
                "clean, duplicates, decontaminate, bad_rows and executor are for text, and the sources are chat: "
                "remove them"
            )
        return self

    @property
    def is_chat(self) -> bool:
        """Whether documents are conversations."""
        return any(isinstance(source, ChatSource) for source in self.sources)

    @model_validator(mode="after")
    def _addresses_are_known_where_they_count(self) -> "DataRecipe":
        by_address = self.clean is not None and self.clean.urls is not None
        for number, source in enumerate(self.sources):
            field = getattr(source, "url_field", None)
            if by_address and field is None and not isinstance(source, WarcSource):
                raise ValueError(
                    f"clean.urls drops by address, but sources.{number} ({source.type}) tells none: give it a "
                    f"url_field (types jsonl, parquet and hub), or prepare it apart"
                )
            if field is not None and not by_address:
                raise ValueError(
                    f"url_field {field!r} of sources.{number} has no effect without clean.urls; remove it"
                )
        return self

    @property
    def reads_html(self) -> bool:
        """Whether text is taken out of pages, by a library that decides what it is."""
        return any(isinstance(source, WarcSource) and source.html for source in self.sources)

    @model_validator(mode="after")
    def _conversations_have_a_template(self) -> "DataRecipe":
        if not self.is_chat:
            return self
        if not all(isinstance(source, ChatSource) for source in self.sources):
            raise ValueError("chat and text cannot be mixed in one folder: prepare them into two")
        if not isinstance(self.tokenizer, ExistingTokenizer):
            raise ValueError(
                "chat needs a tokenizer made before, with a chat template: use tokenizer type file and a folder"
            )
        return self

    @property
    def folder(self) -> Path:
        """Where the data goes."""
        return Path(self.output or f"data/{self.name}")

    @property
    def stages_folder(self) -> Path:
        """Beside it: what stages leave for one another."""
        place = self.folder.resolve()
        return place.parent / f"{place.name}.stages"
