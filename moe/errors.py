"""Everything that can be wrong with what a user gave us, and how it is said.

TurnoutError
├── ConfigError      a recipe, an option, a layout
├── DataError        raw text, token shards, a tokenizer
├── CheckpointError  a run folder or a saved state
├── TrainingError    training that cannot go on: it diverged
├── ExportError      no stock architecture, a failed comparison
└── LaunchError      processes that did not start or did not end well
"""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2
"""What was asked for cannot be done; one message on stderr says why and what to do."""

EXIT_STOPPED = 75
"""Stopped by a signal after the state was saved (EX_TEMPFAIL): run the same command again to go on."""


class TurnoutError(Exception):
    """A message for the user: what is wrong with which value, the rule, and the way out."""

    local = False
    """Whether this rank alone knows of it, so that it must speak although it is not the first."""


class ConfigError(TurnoutError):
    """A recipe, an override or a layout that contradicts a rule."""


class DataError(TurnoutError):
    """Source text, token shards or a tokenizer that cannot be used as they are."""


class CheckpointError(TurnoutError):
    """A run folder or a saved state that cannot be trusted or does not fit."""


class TrainingError(TurnoutError):
    """Training that cannot go on after `step`, with the last good checkpoint untouched."""

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


class ExportError(TurnoutError):
    """A model without a stock architecture, or an export that does not equal its source."""


class LaunchError(TurnoutError):
    """Processes that could not be started or did not reach their end."""


@contextmanager
def clean_exit(*, speak: bool = True) -> Iterator[None]:
    """Turn a `TurnoutError` into one message on stderr and exit code 2; `speak=False` on other ranks."""
    # Or Python looks for garbage in all of torch before it ends: half a second of every process.
    atexit.register(gc.freeze)
    try:
        yield
    except TurnoutError as error:
        if speak or error.local:
            sys.stderr.write(f"error: {error}\n")
        raise SystemExit(EXIT_USER_ERROR) from None
