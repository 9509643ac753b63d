"""A saved run, or a native folder -> a Hugging Face folder: `turnout export RUN_OR_DIR --to DIR`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe import figures, log
from moe.errors import ConfigError, clean_exit

if TYPE_CHECKING:
    from moe.hf.pages import Dtype
    from moe.hf.verify import Comparison
    from moe.hf.write import Written
    from moe.model.source import Weights


@dataclass(frozen=True)
class ExportResult:
    """An export that is in its place."""

    folder: str
    architecture: str
    step: int | None
    """None: a folder, which has no steps."""
    dtype: str
    num_parameters: int
    num_tensors: int
    num_bytes: int
    """Of the weights."""
    weight_files: tuple[str, ...]
    comparison: "Comparison | None"
    """Against stock transformers; None unless verified."""


def export(
    source: Path,
    to: Path,
    *,
    step: int | None = None,
    dtype: "Dtype" = "fp32",
    max_shard_size: int = 5 * 10**9,
    verify: bool = False,
) -> ExportResult:
    """Write a run's newest step, or `step`, or a native folder, as a stock architecture into the new folder `to`.

    The folder appears when it is whole and, with `verify`, equal to its source under stock transformers. Raises
    `CheckpointError`: no such run, step or folder; `ConfigError`: a step of a folder; `ExportError`: no stock
    architecture, no tokenizer, `to` is taken, or the logits differ.
    """
    from moe.hf import verify as verification
    from moe.hf import write

    with write.new_folder(to) as folder:
        weights, written, step = (_folder if (source / "config.json").is_file() else _run)(
            source, step, folder, dtype, max_shard_size
        )
        compared = verification.verify(folder, weights.model, weights.pieces, dtype) if verify else None
    return ExportResult(
        folder=str(to),
        architecture=written.family.architecture,
        step=step,
        dtype=dtype,
        num_parameters=written.num_parameters,
        num_tensors=written.num_tensors,
        num_bytes=written.num_bytes,
        weight_files=written.weight_files,
        comparison=compared,
    )


def _run(
    run_dir: Path, step: int | None, folder: Path, dtype: "Dtype", max_shard_size: int
) -> tuple["Weights", "Written", int | None]:
    from moe.checkpoint import certificate
    from moe.checkpoint.read import SavedModel
    from moe.hf.write import write

    saved = SavedModel.open(run_dir, step)
    page = certificate.find(saved.run, saved.folder)
    written = write(
        folder,
        saved.run,
        saved.step,
        saved.names(),
        saved.pieces,
        run_dir / "tokenizer",
        dtype=dtype,
        max_shard_size=max_shard_size,
        certified=certificate.sentence(page) if page else "",
    )
    return saved, written, saved.step


def _folder(
    source: Path, step: int | None, folder: Path, dtype: "Dtype", max_shard_size: int
) -> tuple["Weights", "Written", int | None]:
    from moe.hf.source import open_weights
    from moe.hf.write import write_model

    if step is not None:
        raise ConfigError(f"--step is {step}, but {source} is no run: it has no steps. Remove it.")
    weights = open_weights(source)
    written = write_model(
        folder,
        weights.model,
        weights.names(),
        weights.pieces,
        source,
        _CARD.format(name=source.absolute().name),
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    return weights, written, None


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

Written by `turnout export` from a folder of that name.
"""


@click.command("export")
@click.argument("source", metavar="RUN_OR_DIR", type=click.Path(path_type=Path))
@click.option(
    "--to", type=click.Path(path_type=Path), required=True, help="Folder to make; never overwritten."
)
@click.option("--step", type=click.IntRange(min=0), help="Saved step; the newest if not given.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file.")
@click.option(
    "--verify", is_flag=True, help="Compare logits with stock transformers before the folder appears."
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the result to this file too."
)
def command(
    source: Path,
    to: Path,
    step: int | None,
    dtype: "Dtype",
    max_shard_size: str,
    verify: bool,
    json_path: Path | None,
) -> None:
    """Write the model of a run, or of a folder that `turnout import` made, as one that stock transformers loads."""
    log.setup()
    with clean_exit():
        from moe.hf.write import parse_size

        if json_path is not None:
            figures.check_place(json_path)
        result = export(
            source, to, step=step, dtype=dtype, max_shard_size=parse_size(max_shard_size), verify=verify
        )
        what = source if result.step is None else f"step {result.step} of {source}"
        click.echo(
            f"exported {what} as {result.architecture} ({result.num_parameters:,} parameters, "
            f"{result.num_bytes / 1e6:,.1f} MB in {len(result.weight_files)} weight files, {dtype}) to {to}"
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
