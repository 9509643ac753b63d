"""Several pieces of work at once, on the threads that torch's own operations run on."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def together(pieces: Sequence[Callable[[], None]]) -> None:
    """Do all pieces, without gradients: on as many threads as torch uses, of which each that is free takes the next.

    Torch's operations in a piece stay on its thread. Where torch computes by OpenMP these are OpenMP's threads. After
    an operation they wait for the next one with a loop that keeps a core busy for milliseconds: others beside them
    would have to share it. Of what a thread has for itself inference mode alone is the caller's; autocast is off.

    Raises what the first piece that failed raised; the others are done, or not begun.
    """
    inference = torch.is_inference_mode_enabled()

    def alike(piece: Callable[[], None]) -> None:
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
            piece()

    if len(pieces) == 1:
        alike(pieces[0])
        return

    openmp = _openmp()
    if openmp is None:
        _in_pool(alike, pieces)
        return
    left = iter(pieces)
    faults: list[BaseException] = []

    def body(_: object) -> None:
        try:
            for piece in left:
                alike(piece)
        except BaseException as fault:  # nobody above would hear of it
            faults.append(fault)

    # No fewer than torch's own operations use: OpenMP ends the threads that a smaller team leaves out.
    openmp.GOMP_parallel(_BODY(body), None, max(len(pieces), torch.get_num_threads()), 0)
    try:
        if faults:
            raise faults[0]
    finally:
        faults.clear()  # they hold this frame, and all that the pieces hold
    # What a signal's handler raises before `body` has begun ends it unheard.
    for piece in left:
        alike(piece)


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
