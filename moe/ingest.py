"""A Hugging Face folder -> a native folder to train on from: `turnout import HF_DIR --to DIR`."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe import figures, log
from moe.errors import ConfigError, clean_exit

if TYPE_CHECKING:
    from moe.hf.pages import Dtype
    from moe.hf.verify import Comparison
    from moe.model.source import Weights


@dataclass(frozen=True)
class ImportResult:
    """An import that is in its place."""

    folder: str
    source: str
    dtype: str
    num_parameters: int
    num_tensors: int
    num_bytes: int
    """Of the weights."""
    weight_files: tuple[str, ...]
    tokenizer: bool
    """Whether there was one to take along."""
    comparison: "Comparison | None"
    """Against stock transformers on the source; None unless verified."""


def ingest(
    source: str | Path,
    to: Path,
    *,
    dtype: "Dtype" = "fp32",
    max_shard_size: int = 5 * 10**9,
    verify: bool = False,
) -> ImportResult:
    """Write the model at `source`, a Hugging Face folder or a name on the Hub, into the new native folder `to`.

    One piece of a weight is held at a time. The folder appears when it is whole and, with `verify`, equal to the
    source under stock transformers. Raises `ConfigError`: nothing there, or already ours; `CheckpointError`: a
    family, key or shape that is not known; `ExportError`: `to` is taken, or the logits differ.
    """
    from moe.hf import native_write, origin
    from moe.hf.verify import Words
    from moe.hf.verify import verify as compare
    from moe.hf.write import new_folder

    folder, weights = origin.find(source)
    tokenizer = origin.has_tokenizer(folder)
    if not tokenizer:
        log.get().warning("%s holds no tokenizer: text for this model must be prepared with its own", source)
    with new_folder(to) as partial:
        with _progress(weights) as on_piece:
            written = native_write.write(
                partial,
                weights,
                origin=str(source),
                tokenizer=folder if tokenizer else None,
                settings=origin.generation_settings(folder),
                dtype=dtype,
                max_shard_size=max_shard_size,
                on_piece=on_piece,
            )
        compared = None
        if verify:
            from moe.hf.native import NativeFolder

            ours = NativeFolder.open(partial)
            words = Words(str(source), "the imported model", "nothing was imported")
            compared = compare(folder, ours.model, ours.pieces, dtype, rounded=True, words=words)
    return ImportResult(
        folder=str(to),
        source=str(source),
        dtype=dtype,
        num_parameters=written.num_parameters,
        num_tensors=written.num_tensors,
        num_bytes=written.num_bytes,
        weight_files=written.weight_files,
        tokenizer=tokenizer,
        comparison=compared,
    )


@contextmanager
def _progress(weights: "Weights") -> Iterator[Callable[[int], None]]:
    """A live line on a terminal; imports elsewhere say at their end what they did."""
    from math import prod

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from moe.hf.native import stored

    console = Console(stderr=True)
    total = sum(prod(tensor.shape) for tensor in stored(weights.model))
    columns = TextColumn("importing"), BarColumn(bar_width=20), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as line:
        task = line.add_task("", total=total)
        yield lambda size: line.advance(task, size)


@click.command("import")
@click.argument("source", metavar="HF_DIR")
@click.option(
    "--to", type=click.Path(path_type=Path), help="Folder to make; without it the model section is printed."
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16"]),
    help="Of the weights; fp32, which keeps every bit, if not given.",
)
@click.option("--max-shard-size", help="Largest weight file; 5GB if not given.")
@click.option(
    "--verify", is_flag=True, help="Compare logits with stock transformers before the folder appears."
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the result to this file too."
)
def command(
    source: str,
    to: Path | None,
    dtype: "Dtype | None",
    max_shard_size: str | None,
    verify: bool,
    json_path: Path | None,
) -> None:
    """Bring the model in HF_DIR, a folder or a name on the Hub (ORG/NAME), into a folder to train on from.

    Without --to, print the `model:` section that a recipe with `init_from: HF_DIR` needs.
    """
    log.setup()
    with clean_exit():
        from moe.hf import native_write, origin
        from moe.hf.write import parse_size

        if to is None:
            given = {
                "--dtype": dtype,
                "--max-shard-size": max_shard_size,
                "--verify": verify,
                "--json": json_path,
            }
            if useless := next((name for name, value in given.items() if value), None):
                raise ConfigError(
                    f"{useless} is set, but nothing is written without --to. Give --to, or remove it."
                )
            click.echo(native_write.model_section(origin.find(source)[1].model), nl=False)
            return
        if json_path is not None:
            figures.check_place(json_path)
        size = parse_size(max_shard_size or "5GB")
        result = ingest(source, to, dtype=dtype or "fp32", max_shard_size=size, verify=verify)
        click.echo(
            f"imported {result.source} ({result.num_parameters:,} parameters, {result.num_bytes / 1e6:,.1f} MB in "
            f"{len(result.weight_files)} weight files, {result.dtype}) to {to}; its model section for recipes is "
            f"{to / native_write.MODEL_SECTION}"
        )
        if (compared := result.comparison) is not None:
            click.echo(
                f"verified: transformers {compared.transformers} gives the same logits at {compared.num_positions} "
                f"positions: max |difference| {compared.max_difference:.2e} with logits up to "
                f"{compared.logit_scale:.3g}, KL {compared.kl:.1e}"
            )
        if json_path is not None:
            figures.write(json_path, json.dumps(asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    command()
