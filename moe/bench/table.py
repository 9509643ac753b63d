"""A report -> a table for a terminal, or in Markdown."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from moe.bench.case import Case
from moe.bench.compare import Line, Report


def show(title: str, case: Case, report: Report, *, cpu_ratio: bool, markdown: bool) -> None:
    """Print the table and its notes on stdout; `cpu_ratio`: with the column of processor time."""
    unit, scale = ("TFLOP/s", 1e12) if case.device.type == "cuda" else ("GFLOP/s", 1e9)
    columns = ["", "version", "error", "forward ms", "total ms", unit, "/ dense", "quartiles", "peak MiB"]
    columns += ["CPU / dense"] * cpu_ratio
    rows = [[*_cells(line, scale), *[f"{line.cpu_ratio:.2f}"] * cpu_ratio] for line in report.lines]
    notes = [f"plain matmul: {report.matmul_flops_per_s / scale:.3g} {unit}", *_notes(case, report)]
    if markdown:
        _print_markdown(title, columns, rows, notes)
    else:
        _print_table(title, columns, rows, notes)


def _cells(line: Line, scale: float) -> list[str]:
    low, high = line.ratio_quartiles
    return [
        line.name,
        line.version,
        "-" if line.error is None else f"{line.error:.1e}",
        _three_digits(1e3 * line.forward_s),
        _three_digits(1e3 * line.total_s),
        _three_digits(line.flops_per_s / scale),
        f"{line.ratio:.2f}",
        f"{low:.2f}-{high:.2f}",
        _three_digits(line.peak_extra_bytes / 2**20),
    ]


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _notes(case: Case, report: Report) -> Iterable[str]:
    for line in report.lines:
        if line.other_choices:
            yield (
                f"{line.name}: its router made {line.other_choices:.2%} of the choices otherwise; "
                f"its error is on its own choices"
            )
        if line.rounds < case.rounds:
            yield f"{line.name}: timed in {line.rounds} of {case.rounds} rounds"
    for one in report.left_out:
        yield f"{one.name}: {one.reason}"


def _print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]
) -> None:
    table = Table(title=title)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=144, highlight=False, markup=False)
    console.print(table)
    for note in notes:
        console.print(note)


def _print_markdown(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]
) -> None:
    rule = ["---", "---", *["---:"] * (len(columns) - 2)]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))
    page = "\n".join([f"**{title}**", "", body, "", *(f"- {note}" for note in notes)])
    Console(soft_wrap=True, highlight=False, markup=False).print(page)
