"""Knobs of what is done to documents between their source and the encoder, and of who does it."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from moe.recipe import PathText, Section

Patterns = Annotated[list[PathText], Field(min_length=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,@+-]*$")]
Rules = Literal["gopher_quality", "gopher_repetition", "c4_quality", "fineweb_quality"]


class LanguageFilter(Section):
    """Keep documents of certain languages, as a fastText model on this machine tells them."""

    keep: Annotated[list[NonEmpty], Field(min_length=1)]
    """Labels of the model without __label__, such as en."""
    model: PathText
    """A fastText model such as lid.176.bin; none is downloaded."""
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.65
    """How sure the model must be."""


class UrlFilter(Section):
    """Drop documents by the address where they were found; those that tell none are kept."""

    block: list[PathText] = Field(default_factory=list)
    """Files or glob patterns of lists, one entry a line: a domain, with all below it, or the address of one page."""
    words: list[PathText] = Field(default_factory=list)
    """Files or glob patterns of lists, one word a line, that must not stand in an address, between other signs."""
    fineweb: bool = False
    """FineWeb's lists too, which come with datatrove: domains, words, parts of words, words that two make suspect."""

    @model_validator(mode="after")
    def _something_is_blocked(self) -> "UrlFilter":
        if not (self.block or self.words or self.fineweb):
            raise ValueError(
                "neither block nor words nor fineweb is set, so nothing is dropped; remove the block"
            )
        return self


class Clean(Section):
    """What is done to each document on its own, in this order."""

    max_megabytes: PositiveInt = 100
    """Drop documents of more than so many 10^6 bytes."""
    urls: UrlFilter | None = None
    """Drop by address, where sources tell it (url_field, and type warc); null: none."""
    normalise: bool = True
    """Mend wrongly decoded text, and write one form of each character (ftfy)."""
    language: LanguageFilter | None = None
    """Keep some languages; null: all."""
    rules: list[Rules] = Field(default_factory=list)
    """Rules of quality that a document must pass, as datatrove has them; they are made for English."""
    mask_pii: bool = False
    """Put examples in the place of e-mail and public IP addresses."""


class NearDuplicates(Section):
    """MinHash: of documents that are alike only the first stays."""

    shingle_words: Annotated[int, Field(ge=1, le=1_000)] = 5
    """Words of a shingle; documents are alike as far as they share shingles."""
    bands: Annotated[int, Field(ge=1, le=1_000)] = 20
    """Chances to be found alike; more find more."""
    rows: Annotated[int, Field(ge=1, le=100)] = 8
    """Hashes that must agree in a band; more find less."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Another seed, other hashes."""


class Duplicates(Section):
    exact: bool = True
    """Of documents with the same text only the first stays."""
    near: NearDuplicates | None = None
    """Of documents that are nearly the same only the first stays; null: all do."""

    @model_validator(mode="after")
    def _something_is_done(self) -> "Duplicates":
        if not self.exact and self.near is None:
            raise ValueError("neither exact nor near duplicates are looked for; remove the block")
        return self


class Decontaminate(Section):
    """Drop documents that share a run of words with texts that a model will be tested on."""

    paths: Patterns
    """Files or glob patterns: in .jsonl (.gz, .zst) each object is a text, any other file is one."""
    fields: list[NonEmpty] = Field(default_factory=lambda: ["text"], min_length=1)
    """Keys of the objects whose strings are test text; those that an object lacks are passed over."""
    words: Annotated[int, Field(ge=2, le=1_000)] = 13
    """Length of the run."""


class _Executor(Section):
    """What all executors know."""

    part_minutes: Annotated[float, Field(gt=0.0, le=525_600.0)] | None = None
    """A part of a stage that takes longer is ended, with the stack of what it did, and the work with it; null: none."""


class LocalExecutor(_Executor):
    """Processes of this machine."""

    type: Literal["local"]
    workers: Annotated[int, Field(ge=1, le=1_000)] | None = None
    """Processes at work; null: one a core. The result is the same for any number."""


class SlurmExecutor(_Executor):
    """An array job of Slurm for each stage, from a folder that all nodes see."""

    type: Literal["slurm"]
    workers: PositiveInt | None = None
    """Tasks of the array at most, each with its share of the parts; null: a part each, as far as the cluster allows."""
    partition: Word | None = None
    """Where the tasks go; null: the cluster's default."""
    account: Word | None = None
    """Who pays; null: the user's default."""
    qos: Word | None = None
    """Quality of service; null: the cluster's default."""
    task_minutes: PositiveInt | None = None
    """Slurm's limit of time for a task; null: the partition's."""
    cpus: PositiveInt = 1
    """Cores of a task; a part is worked on by one."""
    memory_gigabytes: PositiveInt | None = None
    """Memory of a task, in 2^30 bytes; null: the cluster's default."""


class RayExecutor(_Executor):
    """Tasks of Ray, here or on its cluster, from a folder that all nodes see."""

    type: Literal["ray"]
    address: NonEmpty | None = None
    """A running cluster such as auto or host:port; null: start one of this machine alone, and end it."""
    workers: Annotated[int, Field(ge=1, le=1_000)] | None = None
    """Processes at work on this machine; null: one a core. On a running cluster its cores decide."""
    cpus: PositiveInt = 1
    """Cores of a task."""

    @model_validator(mode="after")
    def _a_running_cluster_has_its_workers(self) -> "RayExecutor":
        if self.address is not None and self.workers is not None:
            raise ValueError(
                f"workers {self.workers} has no effect on a running cluster ({self.address}); remove it"
            )
        return self


Executor = Annotated[LocalExecutor | SlurmExecutor | RayExecutor, Field(discriminator="type")]
