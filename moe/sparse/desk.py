"""Work expert by expert on the CPU: room for one expert's rows, and several experts at once on several threads.

M sources, n rows of one expert, D width, F expert width.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from moe.sparse.activation import GatedUnit
from moe.sparse.product import Products
from moe.sparse.team import together

Payload = TypeVar("Payload")


@dataclass(frozen=True)
class Job(Generic[Payload]):
    """One expert's work."""

    expert: int
    num_rows: int
    rows: Payload


class Desk:
    """Where one thread works: room for one expert's rows, used again for the next, and its share of the sums.

    Rows are in the products' dtype; what is narrower is widened when it comes, rounded when it goes. What a row counts,
    and the sums, are in float32 or wider. What happens to rows between products is done by torch's own operations, one
    after the other.
    """

    forward_rooms: tuple[str, ...] = ("x", "hidden", "out")
    backward_rooms: tuple[str, ...] = (
        "x",
        "out",
        "grad_hidden",
        "grad_gate_up",
        "activated",
        "hidden",
        "product",
    )
    """Those that are always asked for."""

    def __init__(
        self, like: Tensor, most_rows: int, width: int, products: Products, rooms: Sequence[str]
    ) -> None:
        """`like` [M, D]: the sources; `most_rows`: those of the busiest expert; `width`: F.

        `rooms` are those to make now; others are made as they are asked for. What a thread that works beside others
        allocates may come from the kernel, zeroed page by page, so that a desk is better made before it.
        """
        self.like, self.most_rows, self.width = like, most_rows, width
        self.products, self.dtype = products, products.dtype
        wide = torch.promote_types(like.dtype, torch.float32)
        self.sums_MD = torch.zeros_like(like, dtype=wide, memory_format=torch.contiguous_format)
        """At least float32, so that bf16 rounds once."""
        self.rows = 0
        """How many rows the expert at work has."""
        self._buffers: dict[str, Tensor] = {}
        for name in rooms:
            self.room(name)

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

    def add(self, source: Tensor, rows: Tensor) -> None:
        """Add `rows` [n, D] to the sums of their sources."""
        if rows.dtype != self.sums_MD.dtype:
            rows = self._room("wide", rows.shape[1], self.sums_MD.dtype).copy_(rows)
        self.sums_MD.index_add_(0, source, rows)

    def activate(self, unit: GatedUnit, gate_up: Tensor, weight: Tensor) -> Tensor:
        """The unit's output of `gate_up` [n, 2F] times `weight` [n]: [n, F]."""
        gate, up = gate_up.chunk(2, dim=1)
        h = unit.activate(gate, self.room("hidden"))
        return unit.scale(h, up, h).mul_(_column(weight, h))

    def differentiate(
        self, unit: GatedUnit, gate_up: Tensor, weight: Tensor, grad: Tensor, grad_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(what `activate` returned, the gradient of `gate_up`), from `grad` [n, F], the gradient of what `activate`
        returned without the weight. Overwrites `grad`, and writes the weight's gradient to `grad_weight` [n].
        """
        gate, up = gate_up.chunk(2, dim=1)
        sigmoid = self.room("sigmoid") if self.dtype.itemsize >= torch.float32.itemsize else None
        activated = unit.activate(gate, self.room("activated"), sigmoid)
        h = unit.scale(activated, up, self.room("hidden"))
        product = torch.mul(grad, h, out=self.room("product"))
        torch.sum(product, 1, dtype=grad_weight.dtype, out=grad_weight)
        grad_gate_up = self.room("grad_gate_up")
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=1)
        unit.backward(gate, up, activated, grad.mul_(_column(weight, grad)), grad_gate, grad_up, sigmoid)
        return h.mul_(_column(weight, h)), grad_gate_up

    def rows_of(self, name: str, kept: Tensor) -> Tensor:
        """`kept` itself, or widened in the room of that name."""
        return kept if kept.dtype == self.dtype else self.room(name).copy_(kept)

    def weight(self, weight: Tensor) -> Tensor:
        """`weight` itself, or widened in a room that the next weight, or `write`, takes over."""
        return weight if weight.dtype == self.dtype else self._weight_room(weight.shape).copy_(weight)

    def multiply(self, a: Tensor, b: Tensor, room: Tensor) -> Tensor:
        """`a` `b`, in `room` or in memory of its own."""
        return self.products.multiply(a, b, room)

    def write(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Write `a` `b`, of a weight's size, to `out`."""
        if out.dtype == self.dtype or self.products.by_onednn:
            self.products.write(a, b, out)
        else:
            out.copy_(self.products.multiply(a, b, self._weight_room(out.shape)))

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


def _column(weight: Tensor, like: Tensor) -> Tensor:
    """[n] -> [n, 1] in the dtype of `like`."""
    return weight.to(like.dtype).unsqueeze(1)


def at_desks(
    work: Callable[[Desk, int, Payload], None],
    jobs: Sequence[Job[Payload]],
    like: Tensor,
    make: Callable[[int], Desk],
) -> Tensor:
    """Do all jobs, several experts at once where torch may use several threads; the sums, [M, D] as `like`.

    `make`: a desk with room for so many rows.

    An expert's products are small: threads inside each of them would wait for each other more than they work.
    """
    most = max((job.num_rows for job in jobs), default=0)
    shares = _shares(jobs, torch.get_num_threads())
    desks = [make(most) for _ in shares]

    def sit(desk: Desk, share: Sequence[Job[Payload]]) -> None:
        for job in share:
            desk.rows = job.num_rows
            work(desk, job.expert, job.rows)

    together([partial(sit, desk, share) for desk, share in zip(desks, shares, strict=True)])
    sums_MD = desks[0].sums_MD
    for other in desks[1:]:
        sums_MD += other.sums_MD
    return sums_MD.to(like.dtype)


def _shares(jobs: Sequence[Job[Payload]], threads: int) -> list[list[Job[Payload]]]:
    """Jobs in at most `threads` lists of about as many rows: the biggest first, each to who has least so far.

    The same every time, and in order, so that sums are too.
    """
    least = [(0, number) for number in range(max(1, min(threads, len(jobs))))]
    shares: list[list[Job[Payload]]] = [[] for _ in least]
    for job in sorted(jobs, key=lambda job: -job.num_rows):
        rows, number = least[0]
        shares[number].append(job)
        heapq.heapreplace(least, (rows + job.num_rows, number))
    return [sorted(share, key=lambda job: job.expert) for share in shares]
