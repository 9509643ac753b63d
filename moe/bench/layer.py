"""The sparse layer beside the dense limit and its peers: interleaved, median, forward and backward.

`python -m moe.bench.layer --shape olmoe --threads 2 --dtype bf16 --json layer.json`. Peers that are no dependency
(megatron-core, torchtitan, ai2-olmo-core) take part where they are installed: with `pip install --no-deps`, since
torchtitan wants an older `datasets`; what they then lack is named below the table.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import click
import torch

from moe import figures, log
from moe.bench import machine, page, table
from moe.bench.case import DTYPES, BatchKind, Case, make_case
from moe.bench.compare import Report, compare
from moe.bench.peers import select
from moe.bench.problem import PRESETS, RoutingKind
from moe.errors import clean_exit


@click.command("layer")
@click.option("--shape", "preset", type=click.Choice(list(PRESETS)), default="small", show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), help="Instead of the shape's; so with the four below.")
@click.option("--hidden", type=click.IntRange(min=8), help="Width of the layer.")
@click.option("--inner", type=click.IntRange(min=8), help="Width of an expert.")
@click.option("--experts", type=click.IntRange(min=1))
@click.option("--top-k", type=click.IntRange(min=1))
@click.option(
    "--routing", type=click.Choice(["real", "forced"]), default="real", help="Forced: all loads equal."
)
@click.option(
    "--batches",
    type=click.Choice(["same", "new"]),
    default="same",
    help="For each round. New: loads that a library has not seen yet, as early in training.",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="CUDA if there is a device, if not given.")
@click.option("--threads", type=click.IntRange(min=1), help="On CPU; 1 if not given.")
@click.option(
    "--allocator", type=click.Choice(list(machine.ALLOCATORS)), default="default", show_default=True
)
@click.option("--rounds", type=click.IntRange(min=1), help="By shape and device if not given.")
@click.option("--warmup", type=click.IntRange(min=0), help="Rounds before those that count.")
@click.option("--only", multiple=True, metavar="PART", help="Contenders with this in their name; repeatable.")
@click.option(
    "--skip", multiple=True, metavar="PART", help="All but contenders with this in their name; repeatable."
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the figures to this file too."
)
@click.option("--markdown", is_flag=True, help="Print the table in Markdown.")
def command(
    preset: str,
    routing: RoutingKind,
    batches: BatchKind,
    dtype: str,
    device: str | None,
    threads: int | None,
    allocator: str,
    rounds: int | None,
    warmup: int | None,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    json_path: Path | None,
    markdown: bool,
    **sizes: int | None,
) -> None:
    """Time the sparse layer, the dense limit and the peers that are installed.

    Exit codes: 0; 1 somebody's numbers are wrong, or somebody failed; 2 what was asked for cannot be done.
    """
    with clean_exit():
        log.setup()
        shape = replace(PRESETS[preset], **{name: size for name, size in sizes.items() if size is not None})
        case = make_case(
            shape,
            dtype=dtype,
            device=device,
            threads=threads,
            routing=routing,
            rounds=rounds,
            warmup=warmup,
            batches=batches,
        )
        machine.check_allocator(allocator, case.device)
        entries = select(only, skip)
        if json_path is not None:
            figures.check_place(json_path)
        if case.device.type == "cpu":
            torch.set_num_threads(threads or 1)
        here = machine.describe(case.device, allocator)
        report = compare(case, entries)
        alone = case.device.type == "cpu" and torch.get_num_threads() == 1
        table.show(_title(case, allocator), case, report, cpu_ratio=alone, markdown=markdown)
        if json_path is not None:
            figures.write(json_path, page.dump(page.as_page(case, report, machine=here)))
    _judge(case, report)


def _title(case: Case, allocator: str) -> str:
    where = f"threads: {torch.get_num_threads()}, {allocator} allocator"
    if case.device.type == "cuda":
        where = torch.cuda.get_device_name(case.device)
    sizes = ", ".join(f"{name} {size}" for name, size in asdict(case.shape).items())
    batches = "the same batch" if case.batches == "same" else "new batches"
    return f"{case.dtype}, {case.routing} routing, {batches}, {where}, {sizes}"


def _judge(case: Case, report: Report) -> None:
    wrong = [line.name for line in report.lines if not line.is_right(case.dtype)]
    failed = [one.name for one in report.left_out if one.failed]
    faults = [
        f"{what}: {', '.join(names)}"
        for what, names in (("wrong numbers", wrong), ("failed", failed))
        if names
    ]
    if faults:
        raise click.ClickException("; ".join(faults))


def main() -> None:
    """The command, in a process that has the allocator asked for."""
    arguments = sys.argv[1:]
    machine.restart_with(_allocator_asked_for(arguments), "moe.bench.layer", arguments)
    machine.keep_kernels()
    command()


def _allocator_asked_for(arguments: list[str]) -> str:
    """Read before click does: starting anew should come first. The last one counts, as for click."""
    found = "default"
    for number, argument in enumerate(arguments):
        if argument == "--allocator" and number + 1 < len(arguments):
            found = arguments[number + 1]
        elif argument.startswith("--allocator="):
            found = argument.partition("=")[2]
    return found


if __name__ == "__main__":
    main()
