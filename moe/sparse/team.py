"""Several pieces of work at once, on the threads that torch's own operations run on."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def together(pieces: Sequence[Callable[[], None]]) -> None:
    """Do all pieces, each on a thread of its own as far as there are threads, and torch's operations in it on one.

    Where torch computes by OpenMP these are OpenMP's threads. After an operation they wait for the next one with a
    loop that keeps a core busy for milliseconds: others beside them would have to share it.

    Raises what the first piece that failed raised; the others are done, or not begun.
    """
    if len(pieces) == 1:
        pieces[0]()
        return
    inference = torch.is_inference_mode_enabled()

    def alike(piece: Callable[[], None]) -> None:
        # Modes are a thread's own.
        with torch.inference_mode(inference), torch.no_grad():
            piece()

    openmp = _openmp()
    if openmp is None:
        _in_pool(alike, pieces)
        return
    left = iter(pieces)
    faults: list[BaseException] = []

    def body(_: object) -> None:
        try:
            for piece in left:  # one each, or more if there are fewer threads
                alike(piece)
        except BaseException as fault:  # nobody above would hear of it
            faults.append(fault)

    openmp.GOMP_parallel(_BODY(body), None, len(pieces), 0)
    if faults:
        raise faults[0]


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP, which torch for Linux loads for all to see; None where there is another, or none."""
    if "backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    found = ctypes.CDLL(None)
    if not hasattr(found, "GOMP_parallel"):
        return None
    found.GOMP_parallel.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.GOMP_parallel.restype = None
    return found


def _in_pool(work: Callable[[Callable[[], None]], None], pieces: Sequence[Callable[[], None]]) -> None:
    threads = torch.get_num_threads()

    def alone(piece: Callable[[], None]) -> None:
        torch.set_num_threads(1)  # of this thread
        work(piece)

    with ThreadPoolExecutor(len(pieces)) as pool:
        begun = [pool.submit(alone, piece) for piece in pieces]
    torch.set_num_threads(threads)  # what threads to come start with
    for piece in begun:
        piece.result()
