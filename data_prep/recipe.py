"""Every knob of a preparation: sources, tokenizer, validation split, shards."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from moe.recipe import PathText, Section

NonEmpty = Annotated[str, Field(min_length=1)]
Patterns = Annotated[list[PathText], Field(min_length=1)]


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


class ParquetSource(Section):
    """One document a row."""

    type: Literal["parquet"]
    paths: Patterns
    """Files or glob patterns, from the working folder; ** matches folders within folders."""
    text_field: NonEmpty = "text"
    """Column of the text."""


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
    StdlibSource | TextSource | JsonlSource | ParquetSource | HubSource | ChatSource,
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

    @property
    def is_chat(self) -> bool:
        """Whether documents are conversations."""
        return any(isinstance(source, ChatSource) for source in self.sources)

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
