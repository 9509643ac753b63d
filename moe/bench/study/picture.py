"""Results -> a PNG: loss by size, loss by learning rate, loss against balance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.bench.study.outcome import Outcome, Spread
from moe.bench.study.steps import Results
from moe.report.plot import STYLE, save

_COLOURS = ("#2a5d8f", "#d1661a", "#3f8f5b", "#8a4f9e", "#b23a48", "#8a8f98", "#a8862a", "#2a8f8f")


def draw(page: dict[str, Any], png: Path) -> None:
    """Draw a results page. Raises `CheckpointError` if the picture cannot be written."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = Results.from_page(page["results"])
    panels = 3 if results.policies else 2
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * panels, 4.2), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)  # no window, no global state
        axes = figure.subplots(1, panels)
        _draw_models(axes[0], page, results)
        _draw_sweep(axes[1], results)
        if results.policies:
            _draw_policies(axes[2], page, results)
        save(figure, png)


def _draw_models(axes: Any, page: dict[str, Any], results: Results) -> None:
    for colour, (model, runs) in zip(_cycle(results.final), results.final.items(), strict=True):
        size = page["models"][model]["total_parameters"] / 1e6
        _points(axes, [size] * len(runs), runs, colour, model)
    axes.set_xscale("log")
    axes.set_xticks([page["models"][model]["total_parameters"] / 1e6 for model in results.final])
    axes.xaxis.set_major_formatter(lambda size, _: f"{size:.3g}")
    axes.minorticks_off()
    axes.margins(x=0.15)
    axes.set_title("Equal active FLOPs and tokens")
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(frameon=False)


def _draw_sweep(axes: Any, results: Results) -> None:
    for colour, (model, runs) in zip(_cycle(results.sweep), results.sweep.items(), strict=True):
        rates, losses = [run.learning_rate for run in runs], [run.loss for run in runs]
        axes.plot(rates, losses, "o-", color=colour, label=model)
    axes.set_xscale("log")
    axes.set_xticks(sorted({run.learning_rate for runs in results.sweep.values() for run in runs}))
    axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    axes.minorticks_off()
    axes.set_title("The same tries for everyone")
    axes.set_xlabel("peak learning rate")


def _draw_policies(axes: Any, page: dict[str, Any], results: Results) -> None:
    for colour, (policy, runs) in zip(_cycle(results.policies), results.policies.items(), strict=True):
        violations = [run.load.step_violation for run in runs if run.load is not None]
        _points(axes, violations, runs, colour, policy)
    axes.set_xlim(left=0)
    axes.set_title(f"Balancing policies, {page['policies']['model']}")
    axes.set_xlabel("violation in a step (largest / mean load - 1)")
    axes.legend(frameon=False, fontsize=8)


def _points(axes: Any, x: Sequence[float], runs: Sequence[Outcome], colour: str, label: str) -> None:
    """A dot a seed, and a bar at the mean."""
    losses = [run.loss for run in runs]
    axes.plot(x, losses, "o", color=colour, alpha=0.6, markersize=5, markeredgewidth=0)
    centre = Spread.of(x).mean
    axes.plot(
        [centre], [Spread.of(losses).mean], "_", color=colour, markersize=16, markeredgewidth=2, label=label
    )


def _cycle(groups: dict[str, Any]) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(len(groups))]
