"""Work expert by expert on the CPU: room for one expert's rows, and several experts at once on several threads.

M sources, n rows of one expert, D width, F expert width.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Payload = TypeVar("Payload")


@dataclass(frozen=True)
class Job(Generic[Payload]):
    """One expert's work."""

    expert: int
    num_rows: int
    rows: Payload


class Desk:
    """Where one thread works: room for one expert's rows, used again for the next, and its share of the sums.

    Everything at a desk is in the products' dtype; what is narrower is widened when it comes, rounded when it goes.
    """

    def __init__(self, like: Tensor, most_rows: int, width: int, dtype: torch.dtype) -> None:
        """`like` [M, D]: the sources; `most_rows`: those of the busiest expert; `width`: F; `dtype`: the products'."""
        self.like, self.most_rows, self.width, self.dtype = like, most_rows, width, dtype
        wide = torch.promote_types(like.dtype, torch.float32)
        self.sums_MD = torch.zeros_like(like, dtype=wide)
        """At least float32, so that bf16 rounds once."""
        self.rows = 0
        """How many rows the expert at work has."""
        self._buffers: dict[str, Tensor] = {}

    def room(self, name: str) -> Tensor:
        """[rows, width of `name`]; its content is whatever was there."""
        model = self.like.shape[1]
        widths = {"x": model, "out": model, "gate_up": 2 * self.width, "grad_gate_up": 2 * self.width}
        return self._room(name, widths.get(name, self.width), self.dtype)

    def copies(self, name: str, of_MD: Tensor, source: Tensor) -> Tensor:
        """[rows, D], in the room of that name: those that `source` names."""
        if of_MD.dtype == self.dtype:
            return torch.index_select(of_MD, 0, source, out=self.room(name))
        narrow = self._room("narrow", of_MD.shape[1], of_MD.dtype)
        return self.room(name).copy_(torch.index_select(of_MD, 0, source, out=narrow))

    def rows_of(self, name: str, kept: Tensor) -> Tensor:
        """`kept` itself, or widened in the room of that name."""
        return kept if kept.dtype == self.dtype else self.room(name).copy_(kept)

    def weight(self, weight: Tensor) -> Tensor:
        """`weight` itself, or widened in a room that the next weight, or `product`, takes over."""
        return weight if weight.dtype == self.dtype else self._weight_room(weight.shape).copy_(weight)

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Write `a` `b`, of a weight's size, to `out`."""
        if out.dtype == self.dtype:
            torch.mm(a, b, out=out)
        else:
            out.copy_(torch.mm(a, b, out=self._weight_room(out.shape)))

    def add(self, source: Tensor, rows: Tensor) -> None:
        """Add `rows` [n, D] to the sums of their sources."""
        if rows.dtype != self.sums_MD.dtype:
            rows = self._room("wide", rows.shape[1], self.sums_MD.dtype).copy_(rows)
        self.sums_MD.index_add_(0, source, rows)

    def _room(self, name: str, width: int, dtype: torch.dtype) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = self.like.new_empty(self.most_rows, width, dtype=dtype)
        return self._buffers[name].narrow(0, 0, self.rows)

    def _weight_room(self, shape: torch.Size) -> Tensor:
        if "weight" not in self._buffers:
            self._buffers["weight"] = self.like.new_empty(
                2 * self.width * self.like.shape[1], dtype=self.dtype
            )
        return self._buffers["weight"][: shape.numel()].view(shape)


def at_desks(
    work: Callable[[Desk, int, Payload], None],
    jobs: Sequence[Job[Payload]],
    like: Tensor,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Do all jobs, several experts at once where torch may use several threads; the sums, [M, D] as `like`.

    An expert's products are small: threads inside each of them would wait for each other more than they work.
    """
    most = max((job.num_rows for job in jobs), default=0)
    threads = torch.get_num_threads()
    shares = _shares(jobs, threads)

    def sit(share: Sequence[Job[Payload]]) -> Tensor:
        desk = Desk(like, most, width, dtype)
        for job in share:
            desk.rows = job.num_rows
            work(desk, job.expert, job.rows)
        return desk.sums_MD

    if len(shares) == 1:
        return sit(shares[0]).to(like.dtype)
    inference = torch.is_inference_mode_enabled()

    def sit_alone(share: Sequence[Job[Payload]]) -> Tensor:
        torch.set_num_threads(1)  # of this thread; that, and modes, a thread has for itself
        with torch.inference_mode(inference), torch.no_grad():
            return sit(share)

    with ThreadPoolExecutor(len(shares)) as pool:
        sums = list(pool.map(sit_alone, shares))
    torch.set_num_threads(threads)  # what threads to come start with
    for other in sums[1:]:
        sums[0] += other
    return sums[0].to(like.dtype)


def _shares(jobs: Sequence[Job[Payload]], threads: int) -> list[list[Job[Payload]]]:
    """Jobs in at most `threads` lists of about as many rows, in order, so that sums are the same every time."""
    total = sum(job.num_rows for job in jobs)
    shares: list[list[Job[Payload]]] = [[]]
    done = 0
    for job in jobs:
        if len(shares) < threads and (done + job.num_rows / 2) * threads > total * len(shares):
            shares.append([])
        shares[-1].append(job)
        done += job.num_rows
    return shares
