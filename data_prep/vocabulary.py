"""Documents, or a tokenizer made before -> a `Vocabulary`: text to ids, and a Hugging Face tokenizer folder."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.documents import Account, Document, Source, nothing_left
from data_prep.recipe import BpeTokenizer, ExistingTokenizer
from moe.data.shards import FileStamp, TokenizerFacts
from moe.errors import DataError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
_UNMERGED = 256 + len((END_OF_TEXT, PAD))

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_COPIED = (
    _TOKENIZER,
    _CONFIG,
    _SPECIAL,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_UNBOUNDED = int(1e30)  # what transformers takes for "no limit"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with its end-of-document and padding tokens; `files` come along, for one made before."""

    tokenizer: Tokenizer
    eos_token: str
    pad_token: str
    files: tuple[Path, ...] = ()

    @cached_property
    def eos_id(self) -> int:
        return self._id(self.eos_token)

    @cached_property
    def size(self) -> int:
        """One more than the highest id."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text and the end of the document; the names of special tokens in a text are plain text."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        eos_id = self.eos_id
        return [[*encoding.ids, eos_id] for encoding in encodings]

    def save(self, folder: Path) -> TokenizerFacts:
        """Write files that `AutoTokenizer.from_pretrained(folder)` reads."""
        folder.mkdir()
        for path in self.files:
            shutil.copyfile(path, folder / path.name)
        if not (folder / _TOKENIZER).exists():
            self.tokenizer.save(str(folder / _TOKENIZER))
        special = {"eos_token": self.eos_token, "pad_token": self.pad_token}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "clean_up_tokenization_spaces": False,
            "model_max_length": _UNBOUNDED,
        }
        for name, page in {_CONFIG: config, _SPECIAL: special}.items():
            if not (folder / name).exists():
                (folder / name).write_text(json.dumps(page, indent=2) + "\n", encoding="utf-8")
        return TokenizerFacts(
            vocab_size=self.size,
            eos_id=self.eos_id,
            pad_id=self._id(self.pad_token),
            files={path.name: FileStamp.of(path) for path in sorted(folder.iterdir())},
        )

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        assert found is not None
        return found


def train(config: BpeTokenizer, sources: Sequence[Source]) -> Vocabulary:
    """A byte-level BPE with GPT-2's split pattern; equal documents give equal merges.

    Raises `DataError`: no text at all, or too few different pairs in the sample for the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    accounts = {source.name: Account() for source in sources}
    sample = _sample(sources, config.sample_megabytes * 10**6, accounts)
    tokenizer.train_from_iterator(sample, trainer=trainer)
    facts = [account.close(name, None) for name, account in accounts.items()]
    documents = sum(fact.kept.documents for fact in facts)
    if not documents:  # then the sample went through all there is
        raise nothing_left(facts)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size <= _UNMERGED:
        raise DataError(
            f"no two letters stand side by side {config.min_frequency} times or more (tokenizer.min_frequency) in "
            f"the {sum(fact.kept.bytes for fact in facts)} bytes of text in {documents} documents: there is nothing "
            f"to train a tokenizer on. Use more text, or a tokenizer made before (tokenizer.type=file)."
        )
    if size < config.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size is {config.vocab_size}, but the sample has pairs for {size} tokens only, seen "
            f"{config.min_frequency} times or more. Use tokenizer.vocab_size={size} or less, a smaller "
            f"tokenizer.min_frequency, or more text."
        )
    return _plain(Vocabulary(tokenizer, END_OF_TEXT, PAD))


def load(config: ExistingTokenizer) -> Vocabulary:
    """Raises `DataError`: no tokenizer.json, a broken one, or no token to end a document with."""
    path = Path(config.path)
    files = tuple(path / name for name in _COPIED if (path / name).is_file()) if path.is_dir() else (path,)
    page = path / _TOKENIZER if path.is_dir() else path
    if page.name != _TOKENIZER or not page.is_file():
        raise DataError(
            f"tokenizer.path is {config.path}: there is no {_TOKENIZER}. Give such a file, or a folder that holds "
            f"one; a slow tokenizer gets one from transformers' save_pretrained."
        )
    try:
        tokenizer = _parsed(page.read_bytes())
    except Exception as error:  # tokenizers raises nothing narrower
        raise DataError(
            f"{page}: this is not a tokenizer that `tokenizers` reads ({error}). Save it again."
        ) from None
    said = _declared(page.parent) if path.is_dir() else {}
    eos_token = config.eos_token or said.get("eos_token") or END_OF_TEXT
    pad_token = config.pad_token or said.get("pad_token") or eos_token
    for setting, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if tokenizer.token_to_id(token) is None:
            raise DataError(
                f"{page}: there is no token {token!r} in its vocabulary, which documents or rows would end with. "
                f"Set tokenizer.{setting} to one that is."
            )
    return _plain(Vocabulary(tokenizer, eos_token, pad_token, files))


@lru_cache(maxsize=1)  # it takes a tenth of a second, which forked workers are spared
def _parsed(page: bytes) -> Tokenizer:
    tokenizer = Tokenizer.from_buffer(page)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _plain(vocabulary: Vocabulary) -> Vocabulary:
    vocabulary.tokenizer.encode_special_tokens = True
    return vocabulary


def _sample(sources: Sequence[Source], num_bytes: int, accounts: Mapping[str, Account]) -> Iterator[str]:
    """An equal share of text from the beginning of each source; `accounts`, by its name, tell what was read."""
    for source in sources:
        left = num_bytes // len(sources)
        account = accounts[source.name]
        for item in source.items():
            account.reads(item)
            if isinstance(item, Document):
                account.keeps(item)
                yield item.text
                left -= item.num_bytes
            if left <= 0:
                break


def _declared(folder: Path) -> dict[str, str]:
    """Special tokens that the folder's own pages name."""
    said: dict[str, str] = {}
    for name in (_SPECIAL, _CONFIG):
        path = folder / name
        if path.is_file():
            try:
                page: dict[str, Any] = json.loads(path.read_bytes())
            except ValueError as error:
                raise DataError(f"{path}: this is not JSON ({error}). Save the tokenizer again.") from None
            for key in ("eos_token", "pad_token"):
                token = page.get(key)
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    said[key] = token
    return said
