"""On a terminal a run shows live progress; elsewhere plain lines."""

import os
import pty
import re
import subprocess
import sys
import threading

from tests.e2e.test_launchers import Place, _environment, place  # noqa: F401  (place is a fixture)


def _on_a_terminal(command: list[str], place: Place) -> tuple[int, str]:  # noqa: F811  (the fixture)
    """(exit code, all that a terminal would have shown on stderr)."""
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                block = os.read(ours, 4096)
            except OSError:  # the other end is closed
                return
            shown.extend(block)

    reader = threading.Thread(target=read)
    reader.start()
    environment = {
        **_environment(),
        "TERM": "xterm-256color",
        "COLUMNS": "120",  # a line fits, whatever its speed
    }
    process = subprocess.Popen(
        command, cwd=place.folder, env=environment, stderr=theirs, stdout=subprocess.DEVNULL
    )
    os.close(theirs)
    code = process.wait(timeout=120)
    reader.join(timeout=60)
    os.close(ours)
    return code, shown.decode(errors="replace")


def test_a_terminal_shows_step_loss_speed_mfu_balance_and_time_left(place: Place) -> None:  # noqa: F811  (the fixture)
    settings = [
        "train.steps=4",
        "train.evaluate_every=2",
        "parallel.expert_parallel_size=1",
        "run_dir=runs/tty",
    ]
    code, shown = _on_a_terminal([sys.executable, "-m", "moe.train", "recipe.yaml", *settings], place)
    assert code == 0, shown
    assert "Traceback" not in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"4/4 \S* ?\d:\d\d:\d\d loss \d\.\d+ .*tokens/s.*MFU.*max violation", plain), plain
    assert re.search(r"step 2  held-out loss \d\.\d+ nats/token", plain)
    assert [record["step"] for record in place.records("runs/tty")] == [1, 2, 3, 4]
