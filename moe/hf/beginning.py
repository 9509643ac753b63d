"""A recipe's `init_from` -> the weights that the run begins with, known to fit it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.checkpoint.identity import flat
from moe.config import ModelConfig, RunConfig
from moe.config.base import brief
from moe.errors import CheckpointError, ConfigError, DataError
from moe.hf.native_write import MODEL_SECTION
from moe.hf.source import open_weights, tokenizer_folder

if TYPE_CHECKING:
    from moe.model.source import Weights

FREE = ("init_std", "max_sequence_length", "architecture")
"""Switches of the model that neither shape nor function of given weights hangs on."""


def begin(run: RunConfig, *, verify: bool = False) -> "Weights | None":
    """The weights of `init_from`, their headers read and their model section the recipe's; None without `init_from`.

    A run's checkpoint is hashed with `verify` alone. Raises `CheckpointError`: they cannot be read or are not whole;
    `ConfigError`: another model than the recipe's.
    """
    if run.init_from is None:
        return None
    try:
        weights = open_weights(Path(run.init_from), verify=verify)
    except CheckpointError as error:
        raise CheckpointError(f"init_from: {error}") from None
    check_model(run.model, weights.model, run.init_from)
    return weights


def check_model(wanted: ModelConfig, found: ModelConfig, source: str) -> None:
    """Raise `ConfigError` naming the first switch in which the recipe differs from the model at `source`."""
    ours, theirs = flat(_resolved(wanted)), flat(_resolved(found))
    for key in (*ours, *(key for key in theirs if key not in ours)):
        here, there = ours.get(key), theirs.get(key)
        if here == there or key in FREE:
            continue
        raise ConfigError(
            f"model.{key} is {brief(here)}, but the model in init_from, {source}, has {brief(there)}: its weights "
            f"would mean another model. Set model.{key} to that; {_where(source)} has the whole section."
        )


def check_tokenizer(data_tokenizer: Path, source: str) -> None:
    """Raise `DataError` if the model at `source` has a tokenizer, and an id means another token there than in the
    data.
    """
    own = tokenizer_folder(Path(source))
    theirs, ours = own / "tokenizer.json", data_tokenizer / "tokenizer.json"
    if not theirs.is_file() or not ours.is_file() or theirs.read_bytes() == ours.read_bytes():
        return
    from tokenizers import Tokenizer

    try:
        known, used = (
            Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True) for file in (theirs, ours)
        )
    except Exception as error:  # tokenizers raises nothing narrower
        raise DataError(f"{theirs} or {ours} cannot be read ({error}). Get it again.") from None
    token_of = {token_id: token for token, token_id in known.items()}
    for token, token_id in used.items():
        if token_of.get(token_id, token) != token or known.get(token, token_id) != token_id:
            raise DataError(
                f"the data's tokenizer has {token!r} as token {token_id}, but the one of init_from, {source}, has "
                f"{token_of.get(token_id)!r} there and {token!r} as {known.get(token)}: the model would read other "
                f"words than were written. Prepare the data with tokenizer.type=file and tokenizer.path={own}."
            )


def _where(source: str) -> str:
    page = Path(source) / MODEL_SECTION
    if page.is_file():
        return str(page)
    page = Path(source) / "recipe.yaml"
    return str(page) if page.is_file() else f"what `turnout import {source}` prints"


def _resolved(model: ModelConfig) -> dict[str, Any]:
    """Its page with the values that null stands for."""
    page = model.model_dump()
    page["attention"] |= {"num_kv_heads": model.num_kv_heads, "head_dim": model.head_dim}
    return page
