"""A rank's process ends with the code and the words that Python would give it, and without being taken down."""

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, os, sys, threading
from contextlib import nullcontext
if sys.argv[1] == "rank":
    from moe.dist import end_of_rank
else:
    end_of_rank = nullcontext

class Kept:
    def __del__(self, say=os.write):
        say(1, b"taken down ")

kept = Kept()
atexit.register(lambda: print("exit functions", end=" "))
with end_of_rank():
    print("work", end=" ")  # into a buffer
    threading.Timer(0.2, lambda: print("threads", end=" ")).start()
    exec(sys.argv[2])
"""
ENDS = {
    "pass": (0, ""),
    "raise SystemExit(75)": (75, ""),
    "raise SystemExit('in words')": (1, "in words\n"),
    "raise ValueError('of no use')": (1, "ValueError: of no use\n"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_rank_ends_as_python_would_end_it(end: str) -> None:
    rank, other = (
        subprocess.run([sys.executable, "-c", SCRIPT, kind, end], capture_output=True, text=True, timeout=120)
        for kind in ("rank", "other")
    )
    code, words = ENDS[end]
    assert rank.returncode == other.returncode == code
    assert rank.stderr == other.stderr
    assert rank.stderr.endswith(words)
    assert rank.stdout == "work threads exit functions "
    assert other.stdout == "work threads exit functions taken down ", "the script can tell"
