"""A model -> a folder that stock `transformers` loads: whole and checked, or not there at all."""

import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from moe.config import ModelConfig, RunConfig
from moe.errors import ConfigError, ExportError
from moe.hf.card import Facts, card
from moe.hf.convert import Move, check_names, disk_tensors, moves
from moe.hf.family import Family
from moe.hf.match import family_of
from moe.hf.pages import TORCH_NAMES, Dtype, config_page, generation_page, special_tokens
from moe.hf.stream import write_files, write_page

if TYPE_CHECKING:
    from moe.hf.convert import Read
    from moe.hf.stream import Planned

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
)
"""What belongs to the tokenizer in a model's folder, as `transformers` and the Hub name it."""


@dataclass(frozen=True)
class Written:
    """What was written."""

    family: Family
    num_tensors: int
    num_parameters: int
    num_bytes: int
    """Of the weights."""
    weight_files: tuple[str, ...]


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, renamed to it when the block ends well and removed when it does not.

    Raises `ExportError`: `target` exists and is not an empty folder, or its place cannot be written to.
    """
    _refuse_existing(target)
    partial = target.absolute().parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ExportError(f"{target} cannot be made ({error.strerror}). Choose another --to.") from None
    try:
        yield partial
        _refuse_existing(target)
        partial.rename(target)  # onto nothing or an empty folder; anything else is refused by the system
    except OSError as error:
        raise ExportError(
            f"{target} cannot be written ({error}). Mend that, or choose another --to."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(
    folder: Path,
    run: RunConfig,
    step: int,
    names: Collection[str],
    read: "Read",
    tokenizer: Path,
    *,
    dtype: Dtype = "fp32",
    max_shard_size: int = 5 * 10**9,
    facts: Facts | None = None,
) -> Written:
    """`write_model` for a run's saved `step`, with a card that states its recipe and `facts`."""
    balance = run.balance
    return write_model(
        folder,
        run.model,
        names,
        read,
        tokenizer,
        card(family_of(run.model), run, step, dtype, facts or Facts()),
        dtype=dtype,
        max_shard_size=max_shard_size,
        load_balancing_weight=balance.sequence_loss_weight
        + balance.micro_batch_loss_weight
        + balance.global_batch_loss_weight,
    )


def write_model(
    folder: Path,
    model: ModelConfig,
    names: Collection[str],
    read: "Read",
    tokenizer: Path,
    card_text: str,
    *,
    dtype: Dtype = "fp32",
    max_shard_size: int = 5 * 10**9,
    load_balancing_weight: float = 0.0,
) -> Written:
    """Write weights, settings, tokenizer and card into the existing `folder`.

    `names` are the logical names of the model and `read` fetches one as float32, piece by piece; one piece is held at
    a time. `tokenizer` is a folder of its own or a Hugging Face folder, of which nothing else is taken. Raises
    `ExportError`: no stock architecture, names or shapes that are not the model's, no tokenizer.
    """
    family = family_of(model)
    plan = moves(family, model)
    check_names(plan, names)
    tokens = special_tokens(tokenizer)
    copy_tokenizer(tokenizer, folder)
    planned, parameters = _planned(plan, dtype), sum(move.numel for move in plan if not move.copy)
    weight_files = write_files(folder, planned, disk_tensors(plan, read), max_shard_size, parameters)
    page = config_page(family, model, tokens, dtype=dtype, load_balancing_weight=load_balancing_weight)
    write_page(folder / "config.json", page)
    write_page(folder / "generation_config.json", generation_page(tokens))
    (folder / "README.md").write_text(card_text, encoding="utf-8")
    return Written(
        family=family,
        num_tensors=len(planned),
        num_parameters=parameters,
        num_bytes=sum(prod(shape) * kind.itemsize for shape, kind in planned.values()),
        weight_files=weight_files,
    )


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer into the existing `folder`: all of a folder of its own, of a model's only what is the
    tokenizer's.
    """
    hidden = shutil.ignore_patterns(".*")
    if not (source / "config.json").is_file():
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=hidden)
        return
    for path in sorted(path for pattern in TOKENIZER_FILES for path in source.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True, ignore=hidden)
        else:
            shutil.copy(path, folder / path.name)


def parse_size(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` -> bytes; raises `ConfigError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match and match[2].upper() in _UNITS else 0
    if not size:
        raise ConfigError(
            f"--max-shard-size is {text!r}: write a number and KB, MB, GB or GiB, for example 5GB."
        )
    return size


def _planned(plan: list[Move], dtype: Dtype) -> "Planned":
    """Disk names, in order, with shape and dtype; a tensor that several moves share comes once."""
    import torch

    return {
        key: (move.disk_shape, getattr(torch, TORCH_NAMES["fp32" if move.wide else dtype]))
        for move in plan
        for key in move.disk
    }


def _refuse_existing(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise ExportError(
            f"{target} exists already, and turnout never overwrites a model. Choose another --to, or remove it."
        )
