"""A recipe and a number of ranks -> the layouts to try, those that its rules refuse left out with the reason."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from moe.checkpoint.identity import counts_by_micro_batch
from moe.config import ParallelConfig, RunConfig, TrainConfig, check_world
from moe.config.base import Section
from moe.config.numbers import divisors
from moe.config.sequence import sequence_sizes
from moe.engine.ds_config import ONLY_UNDER
from moe.errors import ConfigError

THEN = ("", "resume", "resize")


@dataclass(frozen=True, order=True)
class Layout:
    """How the same training is spread."""

    world: int = 1
    ep: int = 1
    sp: int = 1
    """Ranks that share sequences."""
    zero: int = 1
    accumulation: int = 1
    recompute: str = "none"
    offload: str = "none"
    then: str = ""
    """resume: also stop, save and go on; resize: also go on from here in one process, and the other way round."""

    def __str__(self) -> str:
        words = [f"{self.world} rank{'' if self.world == 1 else 's'}", f"EP {self.ep}", f"ZeRO {self.zero}"]
        words[2:2] = [f"SP {self.sp}"] if self.sp > 1 else []
        words += [f"accumulation {self.accumulation}"] if self.accumulation > 1 else []
        words += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        words += [f"offload {self.offload}"] if self.offload != "none" else []
        return ", ".join([*words, *([self.then] if self.then else [])])


@dataclass(frozen=True)
class Choice:
    """What is tried, and what cannot be."""

    layouts: tuple[Layout, ...]
    left_out: tuple[tuple[Layout, str], ...]
    """With the rule that refuses each."""


def choose(small: RunConfig, recipe: RunConfig, world_size: int, asked: Sequence[str] = ()) -> Choice:
    """The layouts of `asked`, such as "ep=1/2,zero=1/2,then=resize", or a selection on `world_size` ranks.

    Raises `ConfigError`: words that are no layout, or no layout that the recipe allows.
    """
    wanted = [layout for text in asked for layout in parse(text, world_size)]
    fitting: list[Layout] = []
    left_out: list[tuple[Layout, str]] = []
    for layout in dict.fromkeys(wanted or _selection(small, recipe, world_size)):
        try:
            check_world(spread(small, layout), layout.world)
        except ConfigError as error:
            left_out.append((layout, str(error).splitlines()[0]))
        else:
            fitting.append(layout)
    if not fitting:
        raise ConfigError(
            f"--layouts {' '.join(asked)}: the recipe allows none of them. {left_out[0][0]}: {left_out[0][1]}"
        )
    return Choice(tuple(fitting), tuple(left_out))


def parse(text: str, world_size: int) -> list[Layout]:
    """All combinations of "axis=value/value,...". Raises `ConfigError`."""
    axes: dict[str, list[Any]] = {"world": [world_size]}
    for part in text.split(","):
        name, equals, values = part.strip().partition("=")
        known = [field.name for field in fields(Layout)]
        if name not in known or not equals or not values:
            raise ConfigError(
                f"--layouts {text}: {part!r} is no part of a layout. Write axis=value, or axis=value/value for "
                f"several, with commas between; axes are {', '.join(known)}."
            )
        axes[name] = [_value(text, name, value) for value in values.split("/")]
    return [Layout(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def _value(text: str, name: str, value: str) -> int | str:
    allowed: dict[str, Sequence[Any]] = {
        "zero": zero_stages(),
        "recompute": _literals(TrainConfig, "activation_recomputation"),
        "offload": offloads(),
        "then": THEN[1:],
    }
    if name not in allowed and value.isdecimal() and 0 < int(value) <= 64:
        return int(value)
    found = [choice for choice in allowed.get(name, ()) if str(choice) == value]
    if not found:
        rule = f"one of {', '.join(map(str, allowed[name]))}" if name in allowed else "a number of 1 to 64"
        raise ConfigError(f"--layouts {text}: {name} is {value!r}: it must be {rule}.")
    chosen: int | str = found[0]
    return chosen


def _selection(small: RunConfig, recipe: RunConfig, world_size: int) -> list[Layout]:
    """Every EP with every ZeRO stage, the other axes in turns, so that each value stands beside many others."""
    experts = small.model.moe.num_experts if small.model.moe else 1
    eps = [ep for ep in divisors(world_size) if experts % ep == 0]
    recomputes = [r for r in _literals(TrainConfig, "activation_recomputation") if r != "none"]
    chosen = [
        Layout(world_size, ep, zero=zero, accumulation=1 + (row + column) % 2)
        for row, ep in enumerate(eps)
        for column, zero in enumerate(zero_stages())
    ]
    widest = Layout(world_size, eps[-1])
    chosen += [
        replace(widest, sp=sp, zero=zero_stages()[-1 - turn % 2], accumulation=1 + turn % 2)
        for turn, sp in enumerate(sequence_sizes(small))
        if sp > 1 and world_size % sp == 0
    ]
    chosen += [replace(widest, recompute=r, accumulation=1 + turn % 2) for turn, r in enumerate(recomputes)]
    chosen += [
        replace(widest, zero=zero, offload=o)
        for o in offloads()
        for zero in zero_stages()[-2:]
        if o != "none"
    ]
    mine = recipe.parallel
    own = Layout(
        world_size,
        mine.expert_parallel_size if mine.expert_parallel_size in eps else eps[-1],
        math.gcd(mine.sequence_parallel_size, world_size, max(sequence_sizes(small))),
        mine.zero_stage,
        recompute=recipe.train.activation_recomputation,
        offload=mine.offload,
    )
    chosen += [replace(own, then="resume"), replace(own, then="resize")]
    if world_size > 1:
        chosen += [replace(widest, zero=zero_stages()[-1], then="resize")]
        chosen += [Layout(accumulation=2, recompute=r) for r in recomputes[-1:]]
    return chosen


def zero_stages() -> list[int]:
    """Those that a recipe may ask for."""
    return _literals(ParallelConfig, "zero_stage")


def offloads() -> list[str]:
    """What a recipe may keep in the host's memory."""
    return _literals(ParallelConfig, "offload")


def _literals(section: type[Section], key: str) -> list[Any]:
    return list(get_args(section.model_fields[key].annotation))


def spread(small: RunConfig, layout: Layout, folder: Path | None = None) -> RunConfig:
    """The small recipe in a layout; raises `ConfigError` if that cannot be."""
    page = small.model_dump()
    if layout.world % layout.sp:
        raise ConfigError(f"{layout.world} ranks cannot share sequences {layout.sp} by {layout.sp}.")
    per_pass = layout.world // layout.sp * layout.accumulation
    if small.train.global_batch_size % per_pass:
        raise ConfigError(
            f"{layout.world} ranks x {layout.accumulation} micro-batches do not divide the batch of "
            f"{small.train.global_batch_size} sequences."
        )
    page["run_dir"] = None if folder is None else str(folder)
    page["train"]["micro_batch_size"] = small.train.global_batch_size // per_pass
    page["train"]["activation_recomputation"] = layout.recompute
    page["parallel"]["expert_parallel_size"] = layout.ep
    page["parallel"]["sequence_parallel_size"] = layout.sp
    page["parallel"]["zero_stage"] = layout.zero
    page["parallel"]["offload"] = layout.offload
    page["deepspeed"] = _deepspeed(small, layout.zero)
    try:
        return RunConfig.model_validate(page)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None


def _deepspeed(small: RunConfig, zero: int) -> dict[str, Any]:
    """The recipe's further settings, without those that this ZeRO stage does not read."""
    page: dict[str, Any] = {**small.deepspeed}
    block = {
        key: value for key, value in page.pop("zero_optimization", {}).items() if zero in ONLY_UNDER[key]
    }
    if zero == 3:
        block["stage3_param_persistence_threshold"] = 0  # else so small a model is whole on every rank
    return {**page, "zero_optimization": block} if block else page


def reference(small: RunConfig, layout: Layout) -> Layout:
    """One process, nothing spread or saved; with the same micro-batches where they are part of the training."""
    same = layout.world // layout.sp * layout.accumulation if counts_by_micro_batch(small) else 1
    return Layout(accumulation=same)
