"""A run's records -> a PNG: loss, load of every expert, worst overload."""

import os
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import CheckpointError
from moe.report.records import Records, read

if TYPE_CHECKING:
    import numpy as np

LAST_RECORDS = 50
"""Records that the map of expert load averages over."""

_SHORT, _LONG = 30, 60
"""Fewer records are shown as dots; more are smoothed."""

_BLUE, _ORANGE, _GREY = "#2a5d8f", "#d1661a", "#8a8f98"


def plot_run(metrics_path: Path, png_path: Path, title: str | None = None) -> None:
    """Draw `metrics.jsonl` to `png_path`; a dense model gets the loss alone. `title`: else the folder's name.

    Raises `CheckpointError`: the records cannot be read, or the picture cannot be written.
    """
    records = read(metrics_path)
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    load_LE = _load(records)
    sparse = load_LE is not None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 8.2) if sparse else (11, 4.6), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)  # no window, no global state
        panels = figure.add_gridspec(2 if sparse else 1, 2, width_ratios=(3, 2))
        _draw_loss(figure.add_subplot(panels[0, :]), records)
        if load_LE is not None:
            _draw_load(figure, figure.add_subplot(panels[1, 0]), load_LE, len(_loaded(records)))
            _draw_violation(figure.add_subplot(panels[1, 1]), records)
        figure.suptitle(
            _title(title or metrics_path.absolute().parent.name, records),
            x=0.012,
            ha="left",
            fontsize=13,
            fontweight="bold",
        )
        _save(figure, png_path)


def _save(figure: Any, path: Path) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror}). Choose another --png.") from None
    finally:
        with suppress(OSError):  # a path through a file, or a folder without permission
            temporary.unlink(missing_ok=True)


_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "axes.edgecolor": _GREY,
    "axes.axisbelow": True,
}


def _draw_loss(axes: Any, records: Records) -> None:
    handles = [_draw_series(axes, *records.column("loss"))]
    if records.evaluation:
        at = [row["step"] for row in records.evaluation]
        values = [row["validation_loss"] for row in records.evaluation]
        handles += axes.plot(at, values, "o", color=_ORANGE, markersize=6, markeredgecolor="white", zorder=3)
        handles[-1].set_label("validation")
        axes.annotate(
            f"{values[-1]:.3f}",
            (at[-1], values[-1]),
            xytext=(3, 9),
            textcoords="offset points",
            ha="right",
            color=_ORANGE,
        )
    axes.set_title("Loss")
    last = records.training[-1]
    if last.get("tokens"):
        axes.set_xlabel(f"optimizer step ({last['tokens'] / last['step']:,.0f} tokens each)")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.legend(handles=handles, frameon=False)


def _draw_series(axes: Any, steps: list[int], values: list[float]) -> Any:
    """A line with dots when short, pale behind its moving average when long; returns the line to read."""
    from matplotlib.ticker import MaxNLocator

    long = len(steps) >= _LONG
    (line,) = axes.plot(
        steps, values, color=_BLUE, linewidth=1.1, alpha=0.3 if long else 1.0, label="training"
    )
    if len(steps) < _SHORT:
        line.set_marker(".")
    if long:
        (line,) = axes.plot(steps, _smooth(values), color=_BLUE, linewidth=1.8, label="training, smoothed")
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.01)
    return line


def _draw_load(figure: Any, axes: Any, load_LE: "np.ndarray[Any, Any]", averaged: int) -> None:
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    layers, experts = load_LE.shape
    # Even loads stay pale: the scale is never narrower than 0x to 2x.
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=max(2.0, float(load_LE.max())))
    image = axes.imshow(load_LE, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    axes.set_title(f"Load of each expert, last {averaged} records" if averaged > 1 else "Load of each expert")
    axes.set_xlabel("expert")
    axes.set_ylabel("sparse layer, from the bottom")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if layers * experts <= 128:
        for layer, expert in product(range(layers), range(experts)):
            load = load_LE[layer, expert]
            pale = abs(float(norm(load)) - 0.5) < 0.33
            axes.text(
                expert,
                layer,
                f"{load:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="black" if pale else "white",
            )
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("tokens / even share")
    bar.ax.yaxis.set_major_formatter(lambda load, _: f"{load:g}x")


def _draw_violation(axes: Any, records: Records) -> None:
    _draw_series(axes, *records.column("max_violation"))
    axes.set_ylim(bottom=0)
    axes.set_title("Worst overload of an expert")
    axes.set_ylabel("largest load / mean load - 1")


def _load(records: Records) -> "np.ndarray[Any, Any] | None":
    """Tokens of each expert over the even share, [L, E]; None if nothing was routed."""
    import numpy as np

    rows = _loaded(records)
    if not rows:
        return None
    tokens_LE = np.sum([np.asarray(row["tokens_per_expert"], dtype=np.float64) for row in rows], axis=0)
    load_LE: np.ndarray[Any, Any] = tokens_LE / np.maximum(tokens_LE.mean(axis=1, keepdims=True), 1e-9)
    return load_LE


def _loaded(records: Records) -> list[dict[str, Any]]:
    return [row for row in records.training if row.get("tokens_per_expert")][-LAST_RECORDS:]


def _smooth(values: list[float]) -> "np.ndarray[Any, Any]":
    """A centred moving average over a fiftieth of the run, narrower at the ends."""
    import numpy as np

    half = max(2, len(values) // 100)
    at = np.arange(len(values))
    width = np.minimum(np.minimum(at, len(values) - 1 - at), half)

    def windows(parts: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        total = np.concatenate([[0.0], np.cumsum(parts)])
        summed: np.ndarray[Any, Any] = total[at + width + 1] - total[at - width]
        return summed

    finite = np.isfinite(values)  # one NaN must not wipe out what follows it
    with np.errstate(invalid="ignore", divide="ignore"):
        smoothed: np.ndarray[Any, Any] = windows(np.where(finite, values, 0.0)) / windows(finite * 1.0)
    return smoothed


def _title(name: str, records: Records) -> str:
    last = records.training[-1]
    parts = [name, f"{last['step']:,} steps"]
    if last.get("tokens_per_second"):
        speeds = sorted(row["tokens_per_second"] for row in records.training if row.get("tokens_per_second"))
        parts.append(f"{speeds[len(speeds) // 2]:,.0f} tokens/s")
    return "   ·   ".join(parts)
