"""Tokens per expert over steps -> two maps: every expert through the run, and the last records alone.

L sparse layers, E experts, N spans of steps.
"""

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from moe.records import Records

if TYPE_CHECKING:
    import numpy as np

LAST_RECORDS = 50
"""Records that the map of the latest load averages over."""

_SPANS = 240
"""Columns of the map over the run, at most."""


@dataclass(frozen=True)
class Loads:
    """Tokens of an expert over the even share of its layer."""

    history_NLE: "np.ndarray[Any, Any]"
    latest_LE: "np.ndarray[Any, Any]"
    first_step: int
    last_step: int
    averaged: int
    """Records that `latest_LE` is made of."""

    @classmethod
    def of(cls, records: Records) -> "Loads | None":
        """None if nothing was routed."""
        import numpy as np

        rows = [row for row in records.training if row.get("tokens_per_expert")]
        if not rows:
            return None
        tokens = np.asarray([row["tokens_per_expert"] for row in rows], dtype=np.float64)
        spans = np.array_split(tokens, min(_SPANS, len(rows)))
        last = tokens[-LAST_RECORDS:]
        return cls(
            _over_even(np.stack([span.sum(0) for span in spans])),
            _over_even(last.sum(0)),
            rows[0]["step"],
            rows[-1]["step"],
            len(last),
        )

    @property
    def rows(self) -> int:
        """Experts of all layers."""
        return self.latest_LE.size

    @property
    def norm(self) -> Any:
        """The scale of both maps: even loads stay pale, since it is never narrower than 0x to 2x."""
        import numpy as np
        from matplotlib.colors import TwoSlopeNorm

        # Where few cells are far above all others, the others must still be told apart.
        high = max(float(np.percentile(self.history_NLE, 99.5)), float(np.percentile(self.latest_LE, 99.5)))
        return TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=max(2.0, high))

    @property
    def largest(self) -> float:
        return max(float(self.history_NLE.max()), float(self.latest_LE.max()))


def draw_history(axes: Any, loads: Loads) -> None:
    """A row an expert, in the order of the layers from the bottom; time runs to the right."""
    from matplotlib.ticker import MaxNLocator

    layers, experts = loads.latest_LE.shape
    axes.imshow(
        loads.history_NLE.reshape(-1, loads.rows).T,
        cmap="RdBu_r",
        norm=loads.norm,
        aspect="auto",
        origin="lower",
        interpolation="nearest" if loads.rows <= 128 else "auto",
        extent=(loads.first_step - 0.5, loads.last_step + 0.5, 0, loads.rows),
    )
    axes.set_title("Load of every expert through the run")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"sparse layer, {experts} experts each" if experts > 1 else "sparse layer", labelpad=8)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    every = -(-layers // 12)
    axes.set_yticks([(layer + 0.5) * experts for layer in range(0, layers, every)])
    axes.set_yticklabels([str(layer) for layer in range(0, layers, every)])
    axes.tick_params(axis="y", length=0)
    for layer in range(1, layers):
        axes.axhline(layer * experts, color="white", linewidth=2.5 if layers <= 12 else 0.6)


def draw_latest(axes: Any, loads: Loads) -> None:
    """A cell an expert, with its number where there is room."""
    from matplotlib.ticker import MaxNLocator

    layers, experts = loads.latest_LE.shape
    norm = loads.norm
    image = axes.imshow(
        loads.latest_LE, cmap="RdBu_r", norm=norm, aspect="auto", origin="lower", interpolation="nearest"
    )
    axes.set_title(
        f"The same, last {loads.averaged} records" if loads.averaged > 1 else "The same, last record"
    )
    axes.set_xlabel("expert")
    axes.set_ylabel("sparse layer, from the bottom")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if layers <= 12 and experts <= 10:
        for layer, expert in product(range(layers), range(experts)):
            load = loads.latest_LE[layer, expert]
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
    bar = axes.figure.colorbar(
        image, ax=axes, pad=0.02, extend="max" if loads.largest > norm.vmax else "neither"
    )
    bar.outline.set_visible(False)
    bar.set_label("tokens / even share")
    bar.ax.yaxis.set_major_formatter(lambda load, _: f"{load:g}x")


def _over_even(tokens: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    import numpy as np

    share: np.ndarray[Any, Any] = tokens / np.maximum(tokens.mean(axis=-1, keepdims=True), 1e-9)
    return share
