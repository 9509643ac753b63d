"""The data section of a recipe -> the folders that a run trains on, and whose turn it is at every sample."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import gt
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
    _refuse_overuse(config.mixture, mixture, uses, epochs, steps)
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
    config: MixtureConfig, mixture: Mixture, uses: Sequence[Use], rows: Sequence[int], steps: int
) -> None:
    samples = sum(use.samples for use in uses)
    batch = samples // steps
    asked = [source.epochs for source in config.sources if source.epochs is not None]
    if asked:
        # Not each on its own: shares are even to within a few samples, so one may end a little before another.
        total = int(sum(map(_limit, asked, rows)))
        if samples > total:
            fewer = f"at most {total // batch} train.steps, or " if total >= batch else ""
            raise ConfigError(
                f"data.mixture: {steps} steps see {samples} sequences, but the epochs of its sources make {total}: "
                f"{_passed(config, uses)}. Use {fewer}more epochs."
            )
        return
    limits = [_limit(source.max_epochs, epoch) for source, epoch in zip(config.sources, rows, strict=True)]

    def is_over(step: int) -> bool:
        return any(map(gt, mixture.counts(step * batch), limits))

    if not is_over(steps):
        return
    most = bisect_left(range(steps), True, key=is_over) - 1
    fewer = (
        f" at most {most} train.steps,"
        if most > (config.stages[-1].from_step if config.stages else 0)
        else ""
    )
    faults = [
        f"data.mixture: {steps} steps would see source {source.name} {use.epochs:.2f} times ({use.samples} of "
        f"its {epoch} sequences), but its max_epochs is {source.max_epochs:g}. Use a smaller weight,{fewer} or a "
        f"larger max_epochs."
        for source, use, epoch, limit in zip(config.sources, uses, rows, limits, strict=True)
        if use.samples > limit
    ]
    raise ConfigError("\n       ".join(faults))


def _limit(epochs: float, rows: int) -> float:
    return round(epochs * rows, 6)  # 0.29 of 100 are 29


def _passed(config: MixtureConfig, uses: Sequence[Use]) -> str:
    """Which source would be seen how much too often."""
    pairs = zip(config.sources, uses, strict=True)
    source, use = max(pairs, key=lambda pair: pair[1].epochs / (pair[0].epochs or 1.0))
    return f"source {source.name} would be seen {use.epochs:.2f} times, but its epochs is {source.epochs:g}"
