"""A CPU's abilities -> how it multiplies fastest: in which dtype, and by which of torch's libraries."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe import log

_BF16_UNITS = ("avx512_bf16", "avx10_2", "amx_bf16", "bf16", "sve_bf16")
"""Names of `torch.cpu.get_capabilities`: of x86, the last two of ARM."""

LEAST_ROWS, LEAST_WEIGHT = 32, 1 << 15
"""What is smaller is over before oneDNN has found its kernel. Two bounds, not one of their product, so that who
multiplies rarely depends on how many ranks share a batch."""

_BLOCK_ROWS = 256
"""Of a product, at a time: what oneDNN returns is still in the cache when it is copied to where it belongs."""

_TRIAL_SIZE, _TRIAL_ROUNDS = 320, 5
_WORTH_IT = 0.75
"""Of the time: a smaller difference is not worth the copies, and may come out otherwise next time."""


@dataclass(frozen=True)
class Products:
    """How tensors are multiplied."""

    dtype: torch.dtype
    by_onednn: bool = False
    """Whether float32 goes to oneDNN, past `torch.mm`."""

    @classmethod
    def of(cls, like: Tensor, rows: int, weight: Tensor) -> "Products":
        """For so many rows `like` these, times a matrix as big as `weight`, where they lie."""
        dtype = product_dtype(like)
        free = like.device.type == "cpu" and dtype == torch.float32
        big = rows >= LEAST_ROWS and weight.numel() >= LEAST_WEIGHT
        return cls(dtype, free and big and bool(torch.backends.mkldnn.enabled) and onednn_is_faster())

    @property
    def kernel_per_size(self) -> bool:
        """Whether there is a kernel for each size, made when it first comes: torch's bf16 goes to oneDNN too."""
        return self.by_onednn or self.dtype == torch.bfloat16

    def for_backward(self) -> "Products":
        """These; but with create_graph=True those by torch.mm, which torch knows how to differentiate."""
        return Products(self.dtype) if torch.is_grad_enabled() else self

    def multiply(self, a: Tensor, b: Tensor, room: Tensor | None = None) -> Tensor:
        """`a` [n, k] times `b` [k, m], in `room` [n, m] or in memory of its own: what is returned counts."""
        return _by_onednn(a, b) if self.by_onednn else torch.mm(a, b, out=room)

    def write(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """`a` [n, k] times `b` [k, m] to `out` [n, m], which by oneDNN may be of another dtype."""
        if not self.by_onednn:
            torch.mm(a, b, out=out)
            return
        for rows, to in _in_blocks(a.contiguous(), out):  # faster than block by block
            to.copy_(_by_onednn(rows, b))

    def add(self, a: Tensor, b: Tensor, onto: Tensor) -> None:
        """`a` [n, k] times `b` [k, m], added to `onto` [n, m], which may be wider; without a copy of all of `a`."""
        if self.by_onednn:
            for rows, to in _in_blocks(a, onto):
                to += _by_onednn(rows, b)
        elif onto.dtype == self.dtype:
            onto.addmm_(a, b)
        else:
            onto += torch.mm(a, b)


def _in_blocks(a: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(a.split(_BLOCK_ROWS), out.split(_BLOCK_ROWS), strict=True)


def product_dtype(like: Tensor) -> torch.dtype:
    """In what products of tensors `like` this one are to be computed where it lies."""
    if like.dtype != torch.bfloat16 or like.device.type != "cpu":
        return like.dtype
    return torch.bfloat16 if has_bf16_units(torch.cpu.get_capabilities()) else torch.float32


def has_bf16_units(capabilities: Mapping[str, Any]) -> bool:
    """Without them a product in bf16 takes several times as long as one in float32 with all conversions."""
    return any(capabilities.get(name, False) for name in _BF16_UNITS)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 here by far faster than the library behind `torch.mm`, and right.

    In most builds for x86 that is MKL, which on processors that are not Intel's leaves AVX-512 alone: it takes twice as
    long there. Tried once in a process, for milliseconds of the thread's own time, so that it does not matter who else
    is at work. `torch.backends.mkldnn.enabled = False` is the way to do without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return all(_wins_a_trial(transposed) for transposed in (False, True))
    except (AttributeError, RuntimeError) as error:  # of a torch without the operation, or of oneDNN
        log.get().info("float32 is multiplied by torch.mm, since oneDNN cannot: %s", error)
        return False
    finally:
        torch.set_num_threads(threads)


def _wins_a_trial(transposed: bool) -> bool:
    """With one layout of the second matrix."""
    a = torch.linspace(-1, 1, _TRIAL_SIZE**2, dtype=torch.float32, device="cpu").view(
        _TRIAL_SIZE, _TRIAL_SIZE
    )
    b = a.sin().flip(0)
    b = b.t() if transposed else b
    exact = a.double() @ b.double()
    if not torch.allclose(_by_onednn(a, b).double(), exact, rtol=1e-4, atol=1e-4):
        return False
    rounds = [(_seconds(_by_onednn, a, b), _seconds(torch.mm, a, b)) for _ in range(_TRIAL_ROUNDS)]
    onednn_s, usual_s = (min(seconds) for seconds in zip(*rounds, strict=True))
    return bool(onednn_s < _WORTH_IT * usual_s)


def _seconds(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    began = time.thread_time()
    multiply(a, b)
    return time.thread_time() - began


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """`b` may be transposed; of other layouts oneDNN has no fast kernel."""
    dense = b if b.is_contiguous() or b.t().is_contiguous() else b.contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, dense.t(), None, "none", [], "")
    return product
