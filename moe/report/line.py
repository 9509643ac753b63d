"""A series over steps -> a line that can be read: dots when short, a moving average when long."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

BLUE = "#2a5d8f"

_SHORT, _LONG = 30, 60
"""Fewer records are shown as dots; more are smoothed."""


def draw_line(
    axes: Any,
    steps: Sequence[int],
    values: Sequence[float],
    *,
    color: Any = BLUE,
    label: str | None = None,
    raw: bool = False,
    smooth: "Smooth | None" = None,
) -> Any:
    """Draw a series; returns the line to read. A long one goes through `smooth`; with `raw` it stays, pale, below."""
    long = smooth is not None and len(steps) >= _LONG
    if long and raw:
        axes.plot(steps, values, color=color, linewidth=1.1, alpha=0.3)
    shown = smooth(values) if smooth is not None and long else values
    (line,) = axes.plot(steps, shown, color=color, linewidth=1.8 if long and raw else 1.2)
    if len(steps) < _SHORT:
        line.set_marker(".")
    if label is not None:
        line.set_label(f"{label}, smoothed" if long else label)
    return line


def step_axis(axes: Any) -> None:
    """Whole steps along the bottom."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.margins(x=0.01)


def mean(values: Sequence[float]) -> "np.ndarray[Any, Any]":
    """A centred moving average over a fiftieth of the run, narrower at the ends."""
    import numpy as np

    at = np.arange(len(values))
    width = np.minimum(np.minimum(at, len(values) - 1 - at), _half(values))

    def windows(parts: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        total = np.concatenate([[0.0], np.cumsum(parts)])
        summed: np.ndarray[Any, Any] = total[at + width + 1] - total[at - width]
        return summed

    finite = np.isfinite(values)  # one NaN must not wipe out what follows it
    with np.errstate(invalid="ignore", divide="ignore"):
        average: np.ndarray[Any, Any] = windows(np.where(finite, values, 0.0)) / windows(finite * 1.0)
    return average


def largest(values: Sequence[float]) -> "np.ndarray[Any, Any]":
    """The largest within the same windows, for what an average would hide."""
    import numpy as np

    half = _half(values)
    padded = np.pad(np.asarray(values, dtype=np.float64), half, constant_values=-np.inf)
    top: np.ndarray[Any, Any] = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1).max(axis=1)
    return top


Smooth = Callable[[Sequence[float]], "np.ndarray[Any, Any]"]


def _half(values: Sequence[float]) -> int:
    return max(2, len(values) // 100)
