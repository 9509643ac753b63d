"""Sentences for people: one logger, rank 0 speaks, other ranks warn."""

import logging
import sys

LOGGER_NAME = "turnout"


def get() -> logging.Logger:
    """The project's logger; `setup` decides where it goes."""
    return logging.getLogger(LOGGER_NAME)


def setup(rank: int = 0) -> logging.Logger:
    """Send sentences to stderr: INFO from rank 0, WARNING and above, with the rank, from the others."""
    logger = get()
    handler = _Stderr()
    who = "" if rank == 0 else f"rank {rank}: "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    return logger


class _Stderr(logging.Handler):
    """Writes to what `sys.stderr` is now, so that a live progress display can put itself below the sentences."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()
