"""A piece of work -> the most memory it held at once, above what stood before it."""

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def peak_extra_bytes(work: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """(what `work` returns, peak bytes of torch's allocator on `device` above those at its beginning).

    What it keeps at its end counts. On CPU every allocation and release is recorded, which slows it down, and on one
    thread, since the profiler sees only the thread that started it.
    """
    if device.type == "cuda":
        gc.collect()  # or it could release earlier work's memory amid this one's
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself on stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            result = work()
    finally:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        return result, _peak(path)


def _peak(trace: Path) -> int:
    """Highest running sum of the bytes that a trace says were taken (positive) and given back (negative)."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0  # 0: CPU
    )
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak
