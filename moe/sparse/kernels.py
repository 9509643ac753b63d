"""rows.cpp -> a library, made by the C++ compiler of the machine that it runs on; none where there is no compiler."""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from moe import log

SOURCE = Path(__file__).with_name("rows.cpp")

_FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC"),
    "-fno-fast-math",  # NaN has to stay NaN, and sums have an order, whatever the compiler's own habits are
    *("-fno-math-errno", "-fno-trapping-math"),  # nobody looks at errno or the flags of exceptions
    "-ffp-contract=fast",  # a b + c is rounded once; -std=c++17 would forbid it
)

_SECONDS = 120.0
"""A compiler that takes so long, for what takes one second, hangs."""

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "copy": [_POINTER] * 3 + [_INT] * 2,
    "add": [_POINTER] * 3 + [_INT] * 2,
    "activate": [_FLOAT] * 3 + [_POINTER] * 3 + [_INT] * 2,
    "differentiate": [_FLOAT] * 3 + [_POINTER] * 5 + [_INT] * 2,
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled rows.cpp, made now if nobody has done so on such a machine; or None, and a sentence in the log.

    While its functions run, other threads of Python run too. The functions check nothing.
    """
    why = ""
    try:
        command = shlex.split(os.environ.get("CXX") or "c++")
        if not command or shutil.which(command[0]) is None:
            why = f"there is no C++ compiler ({' '.join(command)})"
        else:
            found = _found(command)
            if _is_right(found):
                return found
            why = f"{shlex.join(command)} makes code of it that computes something else"
    except subprocess.CalledProcessError as error:
        why = f"{shlex.join(error.cmd[:1])} failed: {_first_error(error)}"
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        why = str(error)
    log.get().warning(
        "experts on CPU work by torch's own operations, which takes them longer: %s. Install a C++ compiler, or name "
        "one in CXX",
        why,
    )
    return None


def _found(compiler: Sequence[str]) -> ctypes.CDLL:
    try:
        home = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
        return _loaded(compiler, home / "turnout")  # where torch keeps what it compiles too
    except (OSError, RuntimeError):  # there is no home, or nothing can be written there
        with tempfile.TemporaryDirectory() as folder:
            return _loaded(compiler, Path(folder))


def _loaded(compiler: Sequence[str], folder: Path) -> ctypes.CDLL:
    made = _made(compiler, folder)
    try:
        return _load(made)
    except OSError:  # damaged: the next one is not
        made.unlink(missing_ok=True)
        return _load(_made(compiler, folder))


def _made(compiler: Sequence[str], folder: Path) -> Path:
    """Its name holds all that it depends on, since machines of several kinds may share a home."""
    digest = hashlib.sha256(SOURCE.read_bytes())
    program = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    age = program.stat().st_mtime_ns
    parts = (*compiler, str(program), str(age), *_FLAGS, platform.machine(), _processor())
    digest.update("\0".join(parts).encode())
    made = folder / f"rows-{digest.hexdigest()[:16]}.so"
    if not made.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            fresh = Path(own) / made.name
            subprocess.run(
                [*compiler, *_FLAGS, str(SOURCE), "-o", str(fresh)],
                check=True,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=_SECONDS,
            )
            fresh.replace(made)  # whole, or not at all, whoever else makes it
    return made


def _first_error(error: subprocess.CalledProcessError) -> str:
    lines = [line.strip() for line in (error.stderr or "").splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines
    return telling[0] if telling else f"exit code {error.returncode}"


def _processor() -> str:
    """Its model and abilities, as far as the system tells."""
    page = Path("/proc/cpuinfo")
    if not page.is_file():
        return platform.processor()
    telling = ("model name", "flags", "Features", "CPU part")
    first = page.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(telling))


def _load(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name in ("copy_float32", "copy_bfloat16", "copy_bfloat16_to_float32"):
        _declare(found, name, "copy")
    for kind in ("add", "activate", "differentiate"):
        for dtype in ("float32", "bfloat16"):
            _declare(found, f"{kind}_{dtype}", kind)
    return found


def _declare(found: ctypes.CDLL, name: str, kind: str) -> None:
    function = getattr(found, name)
    function.argtypes, function.restype = _ARGUMENTS[kind], None


def _is_right(found: ctypes.CDLL) -> bool:
    """Whether it computes silu as torch does: what a compiler may take liberties with is all in there."""
    gate = torch.tensor([math.nan, 1.0, -1.0, 0.3, -20.0, 20.0, -100.0, 100.0, -0.01, 5.0], device="cpu")
    both, out, one = torch.cat([gate, torch.ones_like(gate)]), torch.empty_like(gate), torch.ones_like(gate)
    pointers = (tensor.data_ptr() for tensor in (both, one, out))
    found.activate_float32(1.0, 0.0, math.inf, *pointers, 1, len(gate))
    return torch.allclose(out, torch.nn.functional.silu(gate), rtol=1e-5, atol=1e-30, equal_nan=True)
