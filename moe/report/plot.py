"""A run's records -> a PNG: the loss, the load of every expert, and how each sparse layer fares."""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError
from moe.records import Records, read
from moe.report import layers
from moe.report.line import draw_line, mean, step_axis
from moe.report.loads import Loads, draw_history, draw_latest

_ORANGE, _GREY = "#d1661a", "#8a8f98"
_COLUMNS = 12

Panel = tuple[int, Callable[[Any], None]]
"""Columns that it takes, and what draws it into its axes."""


def plot_run(metrics_path: Path, png_path: Path, title: str | None = None) -> None:
    """Draw `metrics.jsonl` to `png_path`; a dense model gets the loss alone. `title`: else the folder's name.

    Raises `CheckpointError`: the records cannot be read, or the picture cannot be written.
    """
    records = read(metrics_path)
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        rows = _rows(records)
        heights = [inches for inches, _ in rows]
        figure = Figure(figsize=(12, sum(heights) + 0.5), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)  # no window, no global state
        grid = figure.add_gridspec(len(rows), _COLUMNS, height_ratios=heights)
        for row, (_, panels) in enumerate(rows):
            left = 0
            for columns, draw in panels:
                draw(figure.add_subplot(grid[row, left : left + columns]))
                left += columns
        figure.suptitle(
            _title(title or metrics_path.absolute().parent.name, records),
            x=0.012,
            ha="left",
            fontsize=13,
            fontweight="bold",
        )
        save(figure, png_path)


def _rows(records: Records) -> list[tuple[float, list[Panel]]]:
    """(inches, panels) from top to bottom, of what the records hold."""
    loads = Loads.of(records)
    if loads is None:
        return [(4.1, [(_COLUMNS, partial(_draw_loss, records=records))])]
    first: list[Panel] = [
        (8, partial(_draw_loss, records=records)),
        (4, partial(layers.draw_violation, records=records)),
    ]
    maps: list[Panel] = [(7, partial(draw_history, loads=loads)), (5, partial(draw_latest, loads=loads))]
    further: list[Panel] = [(4, draw) for draw in layers.panels(records)]
    return [
        (3.5, first),
        (min(6.5, max(3.7, loads.rows / 130)), maps),
        *((2.4, further[at : at + 3]) for at in range(0, len(further), 3)),
    ]


def save(figure: Any, path: Path) -> None:
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


STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "axes.edgecolor": _GREY,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
}


def _draw_loss(axes: Any, records: Records) -> None:
    handles = [draw_line(axes, *records.column("loss"), label="training", raw=True, smooth=mean)]
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
    step_axis(axes)
    last = records.training[-1]
    if last.get("tokens"):
        axes.set_xlabel(f"optimizer step ({last['tokens'] / last['step']:,.0f} tokens each)")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.legend(handles=handles, frameon=False)


def _title(name: str, records: Records) -> str:
    last = records.training[-1]
    parts = [name, f"{last['step']:,} steps"]
    if last.get("tokens_per_second"):
        speeds = sorted(row["tokens_per_second"] for row in records.training if row.get("tokens_per_second"))
        parts.append(f"{speeds[len(speeds) // 2]:,.0f} tokens/s")
    return "   ·   ".join(parts)
