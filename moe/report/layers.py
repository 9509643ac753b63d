"""Records -> panels with a line for each sparse layer: overload, entropies, logits, biases, dead experts, drops."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from moe.records import Records
from moe.report.line import BLUE, Smooth, draw_line, largest, mean, step_axis

_FEW = 8
"""Layers that a legend can name; more get a scale of colours."""

Draw = Callable[[Any], None]


def draw_violation(axes: Any, records: Records) -> None:
    """The worst expert of each layer; of the worst layer alone where records are of an older version."""
    steps, values = records.per_layer("max_violation")
    if steps:
        _draw_layers(axes, steps, values)
        _name_layers(axes, len(values[0]))
    else:
        draw_line(axes, *records.column("max_violation"), raw=True, smooth=mean)
        step_axis(axes)
    axes.set_ylim(bottom=0)
    axes.set_title("Worst overload of an expert")
    axes.set_ylabel("largest load / mean load - 1")


@dataclass(frozen=True)
class _Panel:
    title: str
    label: str
    smooth: Smooth | None = mean
    """What a long series goes through; None: shown as it is."""
    from_zero: bool = True
    whole: bool = False
    """Whether values are counts."""


_PANELS = {
    "load_entropy": _Panel("Entropy of the load", "1: balance", from_zero=False),
    "router_entropy": _Panel("Entropy of the mean probabilities", "1: no expert preferred", from_zero=False),
    "token_entropy": _Panel(
        "Entropy of a token's probabilities", "1: undecided, 0: certain", from_zero=False
    ),
    "logit_rms": _Panel("Router logits", "root mean square"),
    "logit_max": _Panel("Largest router logit", "|logit|", smooth=largest),
    "steps_since_use": _Panel("Longest unused expert", "steps since its last token", smooth=None, whole=True),
    "dead_experts": _Panel(
        "Dead experts (no token for 100 steps)", "experts of the layer", smooth=None, whole=True
    ),
    "dropped": _Panel("Dropped choices", "share of all choices"),
}
"""By the name that the records have."""


def panels(records: Records) -> list[Draw]:
    """What draws the further panels, of what the records hold."""
    found: list[Draw] = [
        partial(_draw_named, records=records, name=name) for name in _PANELS if _is_news(records, name)
    ]
    if records.per_layer("bias_min")[0]:
        found.append(partial(_draw_biases, records=records))
    return found


def _is_news(records: Records, name: str) -> bool:
    _, values = records.per_layer(name)
    return any(map(any, values)) if name == "dead_experts" else bool(values)


def _draw_named(axes: Any, records: Records, name: str) -> None:
    panel = _PANELS[name]
    _draw_layers(axes, *records.per_layer(name), smooth=panel.smooth)
    axes.set_title(panel.title)
    axes.set_ylabel(panel.label)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if panel.whole:
        from matplotlib.ticker import MaxNLocator

        axes.set_ylim(top=max(1.0, axes.get_ylim()[1]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def _draw_biases(axes: Any, records: Records) -> None:
    for name in ("bias_min", "bias_max"):
        _draw_layers(axes, *records.per_layer(name), smooth=None)
    axes.axhline(0, color="#8a8f98", linewidth=0.8)
    axes.set_title("Selection bias")
    axes.set_ylabel("smallest and largest")


def _draw_layers(
    axes: Any, steps: list[int], values: list[list[float]], smooth: Smooth | None = mean
) -> None:
    layers = len(values[0])
    for layer, color in enumerate(_colors(layers)):
        draw_line(
            axes,
            steps,
            [row[layer] for row in values],
            color=color,
            label=str(layer),
            smooth=smooth,
            raw=layers == 1 and smooth is mean,
        )
    step_axis(axes)


def _name_layers(axes: Any, layers: int) -> None:
    if 1 < layers <= _FEW:
        names = [f"sparse layer {layer}" if layer == 0 else str(layer) for layer in range(layers)]
        # Above all panels, beside the title: it is the key of all of them.
        axes.figure.legend(
            axes.get_lines()[:layers],
            names,
            loc="upper right",
            ncols=layers,
            frameon=False,
            fontsize=9,
            columnspacing=1.2,
        )
    elif layers > _FEW:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize

        scale = ScalarMappable(Normalize(-0.5, layers - 0.5), ListedColormap(_colors(layers)))
        bar = axes.figure.colorbar(scale, ax=axes, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("sparse layer, from the bottom")


def _colors(layers: int) -> list[Any]:
    """Dark at the bottom; the brightest yellow is left out, since it cannot be seen on white."""
    from matplotlib import colormaps

    if layers == 1:
        return [BLUE]
    return [colormaps["viridis"](0.9 * layer / (layers - 1)) for layer in range(layers)]
