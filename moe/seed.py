"""A purpose and its keys -> a random stream of its own; never the global generator."""

import hashlib

import torch

Key = int | str


def stream(purpose: str, *keys: Key) -> torch.Generator:
    """A CPU generator that depends on `purpose` and `keys` alone: not on ranks, layout or call order."""
    return torch.Generator().manual_seed(number(purpose, *keys))


def number(purpose: str, *keys: Key) -> int:
    """A 63-bit seed for libraries that take a number."""
    text = "/".join([purpose, *(repr(key) for key in keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
