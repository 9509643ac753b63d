"""Results as plain data -> Markdown tables."""

from collections.abc import Iterable, Sequence
from typing import Any

from moe.bench.study.outcome import LAST_STEPS, Comparison, Outcome, Spread, differences
from moe.bench.study.steps import Results, best

Page = dict[str, Any]


def markdown(page: Page) -> str:
    """All tables of a results page, each with a title and a sentence on how to read it."""
    results = Results.from_page(page["results"])
    parts = [_models(page, results), _sweep(page, results)]
    if results.policies:
        parts.append(_policies(page, results))
    versions = ", ".join(f"{name} {number}" for name, number in page["versions"].items())
    parts.append(f"Made with {versions}.")
    return "\n\n".join(parts) + "\n"


def _models(page: Page, results: Results) -> str:
    baseline, *_ = results.final
    rows = []
    for model, runs in results.final.items():
        shape = page["models"][model]
        router = shape["router_flops_per_token"]
        rows.append(
            [
                model,
                f"{shape['total_parameters'] / 1e6:.2f} M",
                f"{shape['active_parameters'] / 1e6:.2f} M",
                f"{shape['flops_per_token'] / 1e6:.2f} M" + (f" ({router / 1e6:.2f} M)" if router else ""),
                f"{runs[0].learning_rate:g}",
                *_losses(runs),
                *([""] * 3 if model == baseline else _compared(results.final[baseline], runs)),
            ]
        )
    seeds = len(results.final[baseline])
    intro = (
        f"Equal active FLOPs: {page['tokens_per_run']:,} training tokens in {page['steps']} steps, "
        f"{page['data']['validation_tokens']:,} held-out tokens, {_seeds(seeds)}."
    )
    header = [
        "model",
        "parameters",
        "active",
        "FLOPs/token (router)",
        "learning rate",
        "held-out nats/token (lowest - highest)",
        "bits/byte",
        f"minus {baseline}, seed by seed",
        "mean ± 95 %",
        "verdict",
    ]
    return f"{intro}\n\n{_table(header, rows)}"


def _sweep(page: Page, results: Results) -> str:
    rows = []
    for model, tried in results.sweep.items():
        lowest = best(tried).learning_rate
        losses = {run.learning_rate: f"{run.loss:.4f}" for run in tried}
        rows.append(
            [
                model,
                *(f"**{loss}**" if rate == lowest else loss for rate, loss in losses.items()),
            ]
        )
    rates = [f"{rate:g}" for rate in page["learning_rates"]]
    seed = next(iter(results.sweep.values()))[0].seed
    intro = f"The sweep: held-out nats/token by learning rate, seed {seed}."
    edges = {min(page["learning_rates"]), max(page["learning_rates"])}
    if at_edge := [model for model, tried in results.sweep.items() if best(tried).learning_rate in edges]:
        intro += f" Best at the edge of what was tried, so perhaps better beyond: {', '.join(at_edge)}."
    return f"{intro}\n\n{_table(['model', *rates], rows)}"


def _policies(page: Page, results: Results) -> str:
    first, *_ = results.policies
    rows = []
    for policy, runs in results.policies.items():
        loads = [run.load for run in runs if run.load is not None]
        changes = page["policies"]["choices"][policy]
        rows.append(
            [
                policy,
                ", ".join(f"`{change}`" for change in changes) or "as the recipe",
                _losses(runs)[0],
                *([""] * 3 if policy == first else _compared(results.policies[first], runs)),
                _range(load.step_violation for load in loads),
                _range(load.held_out_violation for load in loads),
                _dead((load.dead_in_training for load in loads), loads[0].experts),
                _dead((load.dead_held_out for load in loads), loads[0].experts),
            ]
        )
    seeds = len(results.policies[first])
    intro = (
        f"Balancing policies on {page['policies']['model']}, {_seeds(seeds)}. Violation: largest load / mean load "
        f"- 1, worst layer; of a step, mean over the last {LAST_STEPS}, and over the held-out split. Dead: experts "
        f"of all layers without a token in the last {LAST_STEPS} steps, and in the held-out split, in each run."
    )
    header = [
        "policy",
        "settings",
        "held-out nats/token (lowest - highest)",
        f"minus {first}, seed by seed",
        "mean ± 95 %",
        "verdict",
        "violation, step",
        "violation, held out",
        "dead, training",
        "dead, held out",
    ]
    return f"{intro}\n\n{_table(header, rows)}"


def _losses(runs: Sequence[Outcome]) -> list[str]:
    loss = Spread.of([run.loss for run in runs])
    bits = Spread.of([run.bits_per_byte for run in runs])
    return [f"{loss.mean:.4f} ({loss.low:.4f} - {loss.high:.4f})", f"{bits.mean:.4f}"]


def _compared(baseline: Sequence[Outcome], runs: Sequence[Outcome]) -> list[str]:
    found = differences(baseline, runs)
    compared = Comparison.of(found)
    return [
        ", ".join(f"{difference:+.3f}" for difference in found),
        f"{compared.mean:+.3f} ± {compared.margin:.3f}",
        compared.verdict,
    ]


def _range(values: Iterable[float]) -> str:
    spread = Spread.of(list(values))
    return f"{spread.mean:.2f} ({spread.low:.2f} - {spread.high:.2f})"


def _dead(counts: Iterable[int], experts: int) -> str:
    return f"{', '.join(map(str, counts))} of {experts}"


def _seeds(number: int) -> str:
    return f"{number} seed{'' if number == 1 else 's'}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
