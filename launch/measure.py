"""Ranks of a test, one a host -> how fast each computes, and how fast data goes between each two and among all."""

import datetime
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

_BYTES = 4 << 20
_ROUNDS = 3
_LONG_SECONDS = 0.2
"""For one exchange; after that one more time says enough."""
_MEETING = datetime.timedelta(seconds=20)


def rounds(nodes: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair once, in rounds in which no node is twice (the circle method)."""
    ring: list[int | None] = [*range(nodes), *([None] if nodes % 2 else [])]
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        ring = [ring[0], ring[-1], *ring[1:-1]]


def _partner(node: int, together: Sequence[tuple[int, int]]) -> int | None:
    """Of `node` in this round."""
    return next((low + high - node for low, high in together if node in (low, high)), None)


def compute() -> dict[str, Any]:
    """TFLOP/s of a short matmul on each GPU (bfloat16), or on the CPU (float32, one thread); and whether it is right.

    Ones times ones is exact in every precision, so that a wrong element is a broken device.
    """
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        return {"cpu": [_matmul("cpu", 512)]}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"gpu": [_matmul(f"cuda:{gpu}", 8192) for gpu in range(torch.cuda.device_count())], "nccl": nccl}


def _matmul(device: str, size: int) -> float:
    """0 if the product is wrong."""
    import torch

    cuda = device.startswith("cuda")
    ones = torch.ones(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32)

    def once() -> None:
        ones @ ones
        if cuda:
            torch.cuda.synchronize(device)

    once()
    seconds = _best(once, 10)
    right = bool((ones @ ones == size).all())
    return 2 * size**3 / seconds / 1e12 if right else 0.0


def bandwidth(node: int, nodes: int, address: str, port: int, cuda: bool) -> dict[str, Any]:
    """MB/s to the nodes with a higher number, both ways added; and of an all-reduce and an all-to-all among all.

    Over NCCL between the first GPUs of the hosts with `cuda`, else over gloo; the best of some rounds.
    """
    import torch
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    device = torch.device("cuda:0" if cuda else "cpu")
    dist.init_process_group("nccl" if cuda else "gloo", rank=node, world_size=nodes, timeout=_MEETING)
    try:
        here, there = (torch.zeros(_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
        numbers, share = torch.zeros(_BYTES // 4, device=device), _BYTES // nodes * nodes

        def timed(work: Callable[[], object]) -> float:
            began = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - began

        def swap(peer: int) -> None:
            both = [dist.P2POp(dist.isend, here, peer), dist.P2POp(dist.irecv, there, peer)]
            for work in dist.batch_isend_irecv(both):
                work.wait()

        def pass_through(partners: Iterable[int | None]) -> dict[int, float]:
            """All nodes step by step, as hosts that are slow must not wait for each other's turns."""
            found = {}
            for peer in partners:
                dist.barrier()
                if peer is not None:
                    found[peer] = timed(lambda peer=peer: swap(peer))  # type: ignore[misc]
            return found

        partners = [_partner(node, together) for together in rounds(nodes)]
        best = pass_through(partners)  # the first also connects
        slowest = torch.tensor(max(best.values()), device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times = 1 if float(slowest) > _LONG_SECONDS else _ROUNDS
        for _ in range(times):
            for peer, seconds in pass_through(partners).items():
                best[peer] = min(best[peer], seconds)
        found: dict[str, Any] = {
            "pairs": {peer: 2 * _BYTES / seconds / 1e6 for peer, seconds in best.items() if peer > node}
        }
        for name, work in (
            ("all_reduce", lambda: dist.all_reduce(numbers)),
            ("all_to_all", lambda: dist.all_to_all_single(there[:share], here[:share])),
        ):
            dist.barrier()
            found[name] = _BYTES / min(timed(work) for _ in range(times)) / 1e6
        dist.barrier()
        return found
    finally:
        dist.destroy_process_group()


def _best(work: Callable[[], None], times: int) -> float:
    """Seconds of the fastest of `times`."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
