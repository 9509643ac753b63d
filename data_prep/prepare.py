"""A recipe -> a data folder: shards, tokenizer, manifest."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from data_prep import given, output, report, shares, vocabulary
from data_prep.chat import ChatTokenizer
from data_prep.documents import Account, Document, Dropped, Source, nothing_left
from data_prep.encoder import Encoder
from data_prep.progress import watched
from data_prep.recipe import BpeTokenizer, ChatSource, DataRecipe, ValidationSplit
from data_prep.splits import SplitWriter
from data_prep.texts import open_sources
from data_prep.vocabulary import Vocabulary
from moe import log
from moe.data.shards import (
    TOKENIZER_NAME,
    FileStamp,
    Manifest,
    SourceFacts,
    Split,
    SplitFacts,
    TokenData,
    token_dtype,
)
from moe.errors import DataError

_SPLITS: tuple[Split, ...] = ("train", "validation")
_BATCH_BYTES = 1 << 21


def prepare(recipe: DataRecipe, *, overwrite: bool = False) -> TokenData:
    """Make `recipe.folder`, or find it up to date; `overwrite` replaces what an earlier recipe made there.

    Raises `DataError` for sources, tokenizers and folders that cannot be used; the folder is then as it was.
    """
    with output.errors_of_the_disk(recipe.folder):
        return _prepare(recipe, overwrite)


def _prepare(recipe: DataRecipe, overwrite: bool) -> TokenData:
    sources = open_sources(recipe)
    digests = [source.digest() for source in sources]
    tokenizer = recipe.tokenizer
    ready = None if isinstance(tokenizer, BpeTokenizer) else vocabulary.load(tokenizer)
    if not overwrite and up_to_date(recipe, digests, ready):
        log.get().info("%s is up to date: nothing to do", recipe.folder)
        return TokenData.open(recipe.folder, verify=False)
    with output.workspace(recipe.folder, replace=overwrite) as folder:
        if isinstance(tokenizer, BpeTokenizer):
            log.get().info("training a tokenizer of %s tokens", f"{tokenizer.vocab_size:,}")
            ready = vocabulary.train(tokenizer, [_told(source) for source in sources])
        assert ready is not None
        log.get().info("encoding into %s", recipe.folder)
        manifest = _write(recipe, sources, digests, ready, folder)
        manifest.write(folder)
        report.write(folder)
    summarise(manifest, recipe.folder)
    return TokenData.open(recipe.folder, verify=False)


def _told(source: Source) -> Source:
    """The same, with a count of what is read for the tokenizer."""
    return replace(source, items=lambda: watched(source.items(), f"reading {source.name} for the tokenizer"))


def up_to_date(recipe: DataRecipe, digests: Sequence[str | None], ready: Vocabulary | None) -> bool:
    """Whether the folder holds just this, to the byte; raises `DataError` if it holds anything else."""
    manifest = output.existing(recipe.folder)
    if manifest is None:
        return False
    changed, now = [], recipe.identity
    if manifest.recipe != now:
        keys = {**now, **manifest.recipe}  # a block that was removed is a change too
        changed = [key for key in keys if now.get(key) != manifest.recipe.get(key)]
    elif [source.digest for source in manifest.sources] != list(digests):
        changed = ["the text of the sources"]
    elif manifest.given and manifest.given != given.digests(recipe):
        changed = ["the tests, lists or models that it names"]
    elif ready and any(not _is(manifest.tokenizer.files.get(p.name), p) for p in ready.files):
        changed = ["the tokenizer's files"]
    if changed:
        raise DataError(
            f"{recipe.folder}: it was made from another recipe or other text ({', '.join(changed)} changed). "
            f"Use another output, or --overwrite to replace it."
        )
    try:
        TokenData.open(recipe.folder, verify=True)
    except DataError as damage:
        raise DataError(
            f"{recipe.folder}: this recipe made it, but it is damaged. {damage} "
            f"Use --overwrite to make it again."
        ) from None
    return True


def _is(stamp: FileStamp | None, path: Path) -> bool:
    return stamp is not None and stamp.matches(FileStamp.of(path))


def _write(
    recipe: DataRecipe,
    sources: Sequence[Source],
    digests: Sequence[str | None],
    ready: Vocabulary,
    folder: Path,
) -> Manifest:
    tokenizer = ready.save(folder / TOKENIZER_NAME)
    dtype = token_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        writers = {split: SplitWriter(folder, split, dtype, recipe.shard_tokens) for split in _SPLITS}
        for writer in writers.values():
            stack.callback(writer.abandon)
        if recipe.is_chat:
            accounts = _encode_chat(recipe, sources, digests, ChatTokenizer(folder / TOKENIZER_NAME), writers)
        else:
            encoder = Encoder(ready, fast=recipe.tokenizer.fast)
            accounts = [
                _encode(source, digest, encoder, writers, recipe.validation)
                for source, digest in zip(sources, digests, strict=True)
            ]
        facts = {split: writer.close() for split, writer in writers.items()}
    check_splits(recipe, facts, accounts)
    return Manifest(
        recipe=recipe.identity,
        dtype=dtype,
        tokenizer=tokenizer,
        splits={split: fact for split, fact in facts.items() if fact},
        sources=accounts,
    )


def _encode(
    source: Source,
    digest: str | None,
    encoder: Encoder,
    writers: dict[Split, SplitWriter],
    validation: ValidationSplit,
) -> SourceFacts:
    account, tokens = Account(), 0
    for batch in _batches(watched(source.items(), f"encoding {source.name}")):
        for item in batch:
            account.reads(item)
        documents = [item for item in batch if isinstance(item, Document)]
        for document in documents:
            account.keeps(document)
        tokens += shares.encode(
            [document.text.encode() for document in documents], encoder, writers, validation
        )
    account.tokens = tokens
    return account.close(source.name, digest)


def _encode_chat(
    recipe: DataRecipe,
    sources: Sequence[Source],
    digests: Sequence[str | None],
    tokenizer: ChatTokenizer,
    writers: dict[Split, SplitWriter],
) -> list[SourceFacts]:
    accounts = []
    for config, source, digest in zip(recipe.sources, sources, digests, strict=True):
        assert isinstance(config, ChatSource)
        account = Account(tokens=0)
        for item in watched(source.items(), f"encoding {source.name}"):
            account.reads(item)
            if isinstance(item, Dropped):
                continue
            found = tokenizer.encode(item, config.max_tokens)
            if isinstance(found, Dropped):
                account.drops(item, found.reason)
            else:
                writers[shares.split_of(item.text.encode(), recipe.validation)].add(
                    found.ids, found.num_bytes, found.mask
                )
                account.keeps(item)
                account.tokens = (account.tokens or 0) + len(found.ids)
        accounts.append(account.close(source.name, digest))
    return accounts


def _batches(items: Iterable[Document | Dropped]) -> Iterator[list[Document | Dropped]]:
    """Lists of about `_BATCH_BYTES` of text."""
    so_far = 0

    def block(item: Document | Dropped) -> int:
        nonlocal so_far
        so_far += item.num_bytes + 1
        return so_far // _BATCH_BYTES

    return (list(group) for _, group in groupby(items, key=block))


def check_splits(
    recipe: DataRecipe, facts: dict[Split, SplitFacts | None], accounts: Sequence[SourceFacts]
) -> None:
    """Raise `DataError` unless there is something in every split that is to have something."""
    kept = sum(account.kept.documents for account in accounts)
    if not kept:
        raise nothing_left(accounts)
    fraction = recipe.validation.fraction
    for split in _SPLITS:
        if facts[split] is None and (split == "train" or fraction > 0):
            raise DataError(
                f"validation.fraction is {fraction}: of {kept} documents, none fell to {split}. "
                f"Use more documents, another fraction or validation.seed, or validation.fraction=0."
            )


def summarise(manifest: Manifest, folder: Path) -> None:
    """Say what was read, dropped and written."""
    say = log.get().info
    for source in manifest.sources:
        dropped = "; ".join(f"{amount.documents:,} dropped: {why}" for why, amount in source.dropped.items())
        say(
            "%s: %s documents read, %s",
            source.source,
            f"{source.read.documents:,}",
            dropped or "none dropped",
        )
    for split, facts in manifest.splits.items():
        say(
            "%s: %s documents, %s tokens in %d shards, %.2f bytes a token",
            split,
            f"{facts.documents:,}",
            f"{facts.tokens:,}",
            len(facts.shards),
            facts.bytes / facts.tokens,
        )
    say(
        "%s is ready: vocabulary of %s tokens; %s tells more",
        folder,
        f"{manifest.tokenizer.vocab_size:,}",
        report.HTML_NAME,
    )
