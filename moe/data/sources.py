"""The data section of a recipe -> the folders that a run trains on, and whose turn it is at every sample."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from moe.config import DataConfig
from moe.config.mixture import MixtureConfig, SourceConfig
from moe.data.foreign import ForeignTokens
from moe.data.loader import Batch, train_batches, training_rows
from moe.data.mixture import Mixture, Stage
from moe.data.rows import TokenSource
from moe.data.shards import TokenData
from moe.errors import ConfigError, DataError


@dataclass(frozen=True)
class Use:
    """How much of a source a run sees."""

    name: str
    holds: str
    """Its training split, in words."""
    samples: int
    epochs: float
    share: float
    """Of all samples."""

    def sentence(self) -> str:
        """For the log."""
        part = "" if self.share == 1 else f"{self.share:.2%} of the samples, "
        return f"{self.holds} in {self.name}: {part}{self.epochs:.2f} epochs"


@dataclass(frozen=True)
class Sources:
    """What `moe.data.loader.train_batches` deals out."""

    tokens: tuple[TokenSource, ...]
    mixture: Mixture | None
    fingerprint: str
    """Equal for equal tokens, wherever they lie."""
    uses: tuple[Use, ...]

    def batches(
        self,
        config: DataConfig,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        positions: slice,
        seed: int,
        start_step: int,
    ) -> Iterator[tuple[Batch, ...]]:
        """`moe.data.loader.train_batches` of all of them."""
        return train_batches(
            self.tokens,
            sequence_length=config.sequence_length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            start_step=start_step,
            positions=positions,
            packing=config.packing,
            attend_across_documents=config.attend_across_documents,
            mixture=self.mixture,
        )


def open_sources(
    config: DataConfig,
    data: TokenData,
    *,
    global_batch_size: int,
    steps: int,
    seed: int,
    verify: bool = False,
) -> Sources:
    """Open what the recipe trains on; `data` is the folder at its data.path.

    Raises `DataError` for a source that cannot be read or has another tokenizer, `ConfigError` if the run would see
    one more often than it may.
    """
    samples = steps * global_batch_size
    if config.mixture is None:
        rows = _num_rows(config, data, seed)
        use = Use(config.path, _amount(data), samples, samples / rows, 1.0)
        return Sources((data,), None, data.fingerprint, (use,))
    named = config.mixture.sources
    tokens = tuple(_open(source, data, verify) for source in named)
    epochs = [_num_rows(config, source, seed) for source in tokens]
    mixture = Mixture(_stages(config.mixture, epochs, global_batch_size))
    counts = mixture.counts(samples)
    uses = tuple(
        Use(source.name, _amount(found), count, count / epoch, count / samples)
        for source, found, count, epoch in zip(named, tokens, counts, epochs, strict=True)
    )
    _refuse_overuse(named, uses, epochs, steps)
    page = json.dumps([data.fingerprint, *(source.fingerprint for source in tokens)])
    return Sources(tokens, mixture, xxhash.xxh3_128_hexdigest(page.encode()), uses)


def _amount(data: TokenSource) -> str:
    if data.is_chat:
        return f"{len(data.document_lengths('train')):,} conversations"
    return f"{data.num_tokens('train'):,} training tokens"


def _num_rows(config: DataConfig, source: TokenSource, seed: int) -> int:
    apart = not config.attend_across_documents
    return len(training_rows(source, config.sequence_length, config.packing, apart=apart, seed=seed))


def _open(source: SourceConfig, data: TokenData, verify: bool) -> TokenSource:
    if source.format != "prepared":
        return ForeignTokens.open(Path(source.path), source.format, data.vocab_size, data.pad_id)
    found = TokenData.open(Path(source.path), verify)
    if found.manifest.tokenizer != data.manifest.tokenizer:
        raise DataError(
            f"{source.path}: source {source.name} of data.mixture has another tokenizer than {data.folder}: its ids "
            f"would mean other tokens. Prepare it again with the tokenizer of data.path, or leave it out."
        )
    return found


def _stages(mixture: MixtureConfig, rows: Sequence[int], global_batch_size: int) -> list[Stage]:
    names = [source.name for source in mixture.sources]
    if mixture.stages:
        return [
            Stage(stage.from_step * global_batch_size, tuple(stage.weights.get(name, 0.0) for name in names))
            for stage in mixture.stages
        ]
    weights = [
        source.weight if source.epochs is None else source.epochs * count
        for source, count in zip(mixture.sources, rows, strict=True)
    ]
    return [Stage(0, tuple(weight or 0.0 for weight in weights))]


def _refuse_overuse(
    sources: Sequence[SourceConfig], uses: Sequence[Use], rows: Sequence[int], steps: int
) -> None:
    faults = []
    for source, use, epoch in zip(sources, uses, rows, strict=True):
        limit = source.max_epochs if source.epochs is None else source.epochs
        # Shares are even to within a few samples: epochs asked for may be passed by so many.
        allowed = limit * epoch + (0 if source.epochs is None else len(sources) + 4)
        if use.samples > allowed:
            what = "max_epochs" if source.epochs is None else "epochs"
            most = int(steps * limit / use.epochs)
            fewer = f" at most {most} train.steps," if most else ""
            faults.append(
                f"data.mixture: {steps} steps would see source {source.name} {use.epochs:.2f} times ({use.samples} of "
                f"its {epoch} sequences), but its {what} is {limit:g}. Use a smaller weight,{fewer} or a "
                f"larger {what}."
            )
    if faults:
        raise ConfigError("\n       ".join(faults))
