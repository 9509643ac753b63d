"""What `turnout doctor` runs on each host: questions, a line of JSON each, -> answers, a line of JSON each.

python -m launch.probe

An answer begins with `probe: `, since a host's shell may print lines of its own. Torch is loaded with the first
question that needs it.
"""

import json
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch import machine, measure

ANSWER = "probe: "
_WRITTEN = b"\0" * (1 << 20)
"""Enough for a quota or a full disk to show, which an empty file does not."""
_LEAST_SCRATCH = 16 << 20
_OLD_SECONDS = 600.0
_CONNECT_SECONDS = 3.0


def look(folder: str, mark: str | None, ports: Sequence[int], many: bool) -> dict[str, Any]:
    """What this host says of itself. `mark`: FILE:TEXT, which it must see if it shares the folder."""
    found = machine.gpus()
    return {
        "versions": machine.versions(),
        "folder_fault": _folder_fault(Path(folder), mark),
        "free_bytes": machine.free_bytes(Path(folder)),
        "taken": [port for port in ports if _taken(port)],
        "gpus": [gpu["name"] for gpu in found],
        "faults": [
            *machine.gpu_faults(found),
            *_scratch_faults(),
            *_locks(),
            *(_name_faults() if many else []),
        ],
    }


def _folder_fault(folder: Path, mark: str | None) -> str:
    try:
        if mark is not None:
            path, _, text = mark.rpartition(":")
            if not Path(path).is_file() or Path(path).read_text() != text:
                return f"it does not see {folder} as the first machine does"
        _write(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return ""


def _write(folder: Path) -> None:
    path = folder / f".turnout-probe-{secrets.token_hex(8)}"
    try:
        with path.open("wb") as file:
            file.write(_WRITTEN)
            file.flush()
            os.fsync(file.fileno())
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _scratch_faults() -> list[str]:
    """Of this host's own folders, in which ranks and their agents keep small things."""
    faults = []
    for folder in ("/dev/shm", tempfile.gettempdir()):  # noqa: S108
        path = Path(folder)
        if not path.is_dir():
            continue
        free = machine.free_bytes(path)
        if not os.access(path, os.W_OK):
            faults.append(f"{folder} cannot be written")
        elif free < _LEAST_SCRATCH:
            faults.append(f"{folder} has {free / 1e6:.0f} MB free, {_LEAST_SCRATCH / 1e6:.0f} MB are wanted")
    return faults


def _locks() -> list[str]:
    """A process that was killed while it compiled an op leaves a lock, for which every later one waits for ever."""
    home = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    with suppress(OSError):
        old = [path for path in home.rglob("lock") if time.time() - path.stat().st_mtime > _OLD_SECONDS]
        return [
            f"{path} is an old lock: launches that compile this op wait for it. Remove it" for path in old
        ]
    return []


def _name_faults() -> list[str]:
    """Ranks tell each other the address that their host's name has."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return []  # then the interface is asked instead
    if address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
        return [f"its own name, {name}, is {address}, where no other host finds it: correct /etc/hosts"]
    return []


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def reach(doors: Mapping[str, int]) -> list[str]:
    """The hosts among `doors` (ports by host) where nobody opens."""
    closed = []
    for host, port in doors.items():
        try:
            socket.create_connection((host, port), _CONNECT_SECONDS).close()
        except OSError:
            closed.append(host)
    return closed


def _answer(question: str, given: Mapping[str, Any], door: socket.socket) -> Any:
    if question == "look":
        return look(**given)
    if question == "now":
        return time.time()
    if question == "door":
        door.listen(128)
        return door.getsockname()[1]
    if question == "reach":
        return reach(**given)
    if question == "compute":
        return measure.compute()
    assert question == "bandwidth"
    return measure.bandwidth(**given)


def main() -> None:
    """Answers until its input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # gloo prints
    with socket.socket() as door:
        door.bind(("", 0))
        for line in sys.stdin:
            question, given = json.loads(line)
            try:
                said = {"said": _answer(question, given, door)}
            except Exception as error:  # whatever is wrong here is what we were sent to find
                said = {
                    "fault": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                }
            answers.write(f"{ANSWER}{json.dumps(said)}\n")
            answers.flush()


if __name__ == "__main__":
    main()
