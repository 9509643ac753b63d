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
    handler = logging.StreamHandler(sys.stderr)
    who = "" if rank == 0 else f"rank {rank}: "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    return logger
