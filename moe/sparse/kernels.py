"""rows.cpp -> a library, made by the C++ compiler of the machine that it runs on; none where there is no compiler."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moe import log

SOURCE = Path(__file__).with_name("rows.cpp")

_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
"""No -ffast-math: NaN has to stay NaN, and sums have an order."""

_SECONDS = 120.0
"""For a compiler that takes less than one."""

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "copy": [_POINTER] * 3 + [_INT] * 2,
    "add": [_POINTER] * 3 + [_INT] * 2,
    "activate": [_FLOAT] * 3 + [_POINTER] * 3 + [_INT] * 2,
    "differentiate": [_FLOAT] * 3 + [_POINTER] * 5 + [_INT] * 2,
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """That of this machine, which is compiled if nobody has done so yet; without one a sentence in the log says why.

    Calls of its functions let other threads of Python run. They check nothing.
    """
    command = shlex.split(os.environ.get("CXX") or "c++")
    if not command or shutil.which(command[0]) is None:
        why = f"there is no C++ compiler ({' '.join(command)})"
    else:
        try:
            return _loaded(command, _home())
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or "").strip().splitlines()
            why = f"{shlex.join(command)} failed: {lines[0] if lines else f'exit code {error.returncode}'}"
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error)
    log.get().info(
        "experts on CPU work by torch's own operations, which takes them longer: %s. Install a compiler or name one "
        "in CXX, with TORCH_EXTENSIONS_DIR a folder that can be written",
        why,
    )
    return None


def _loaded(compiler: Sequence[str], home: Path) -> ctypes.CDLL:
    made = _made(compiler, home)
    try:
        return _load(made)
    except OSError:  # damaged: the next one is not
        made.unlink(missing_ok=True)
        return _load(_made(compiler, home))


def _home() -> Path:
    """Where torch keeps what it compiles too."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions") / "turnout"


def _made(compiler: Sequence[str], home: Path) -> Path:
    """Its name holds all that it depends on, since machines of several kinds may share a home."""
    digest = hashlib.sha256(SOURCE.read_bytes())
    digest.update("\0".join((*compiler, *_FLAGS, platform.machine(), _processor())).encode())
    made = home / f"rows-{digest.hexdigest()[:16]}.so"
    if not made.is_file():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            fresh = Path(folder) / made.name
            subprocess.run(
                [*compiler, *_FLAGS, str(SOURCE), "-o", str(fresh)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
            fresh.replace(made)  # whole, or not at all, whoever else makes it
    return made


def _processor() -> str:
    """Its model and abilities, as far as the system tells."""
    page = Path("/proc/cpuinfo")
    if not page.is_file():
        return platform.processor()
    telling = ("model name", "flags", "Features", "CPU part")
    first = page.read_text(encoding="utf-8").partition("\n\n")[0]
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
