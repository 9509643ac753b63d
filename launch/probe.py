"""What `turnout doctor` runs on each host: this host's versions, clock, room and ports; its bandwidth to the others.

python -m launch.probe look FOLDER MARK [PORT]...    answers with JSON, then with its clock to each line it reads
python -m launch.probe speed NODE NODES ADDRESS PORT
"""

import json
import os
import platform
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("turnout", "torch", "deepspeed", "transformers", "numpy")
_BYTES = 4 << 20
_ROUNDS = 3


def look(folder: Path, mark: str, ports: Sequence[int]) -> dict[str, Any]:
    """What this host says of itself; `mark` is what the file `mark` in `folder` holds where it is shared."""
    fault = ""
    try:
        if (folder / "mark").read_text() != mark:
            fault = f"it sees another {folder} than the first machine does"
        mine = folder / f"probe_{secrets.token_hex(8)}"
        mine.write_text(mark)
        mine.unlink()
    except OSError as error:
        fault = f"{error.filename}: {error.strerror}"
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "folder_fault": fault,
        "free_bytes": shutil.disk_usage(folder).free if folder.exists() else 0,
        "taken": [port for port in ports if _taken(port)],
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def rounds(nodes: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair once, in rounds in which no node is twice (the circle method)."""
    ring: list[int | None] = [*range(nodes), *([None] if nodes % 2 else [])]
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        ring = [ring[0], ring[-1], *ring[1:-1]]


def speed(node: int, nodes: int, address: str, port: int) -> dict[int, float]:
    """MB/s to the nodes with a higher number, over gloo, both ways added; the best of some rounds."""
    import datetime

    import torch
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=node, world_size=nodes, timeout=datetime.timedelta(seconds=60))
    found: dict[int, float] = {}
    block, other = torch.zeros(_BYTES, dtype=torch.uint8), torch.zeros(_BYTES, dtype=torch.uint8)
    for pairs in rounds(nodes):
        dist.barrier()
        for low, high in pairs:
            if node not in (low, high):
                continue
            peer = high if node == low else low
            best = float("inf")
            for _ in range(_ROUNDS):
                began = time.perf_counter()
                sent = dist.isend(block, peer)
                dist.recv(other, peer)
                assert sent is not None
                sent.wait()
                best = min(best, time.perf_counter() - began)
            if node == low:
                found[high] = 2 * _BYTES / best / 1e6
    dist.barrier()
    dist.destroy_process_group()
    return found


def main(words: Sequence[str]) -> None:
    if words[0] == "look":
        sys.stdout.write(json.dumps(look(Path(words[1]), words[2], [int(port) for port in words[3:]])) + "\n")
        sys.stdout.flush()
        for _ in sys.stdin:
            sys.stdout.write(f"{time.time()}\n")
            sys.stdout.flush()
    else:
        found = speed(int(words[1]), int(words[2]), words[3], int(words[4]))
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
