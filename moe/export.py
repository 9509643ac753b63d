"""A saved run, or a native folder -> a Hugging Face folder: `turnout export RUN_OR_DIR --to DIR`.

Adapters are merged into the weights, or written for `peft` with `--adapter`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe import figures, log, records
from moe.errors import CheckpointError, ConfigError, ExportError, clean_exit

if TYPE_CHECKING:
    from moe.config.lora import Target
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
    trained_by_target: "dict[Target, int] | None" = None
    """Parameters of the adapters that were merged; None for a run without."""


@dataclass(frozen=True)
class AdapterResult:
    """A folder of adapters that is in its place."""

    folder: str
    architecture: str
    step: int
    dtype: str
    num_tensors: int
    num_bytes: int
    """Of the weights."""
    trained_by_target: "dict[Target, int]"


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
    from moe.checkpoint.read import SavedModel
    from moe.hf import adapter, write
    from moe.hf import verify as verification

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
        trained_by_target=adapter.counted(weights.run) if isinstance(weights, SavedModel) else None,
    )


def export_adapter(
    run_dir: Path, to: Path, *, step: int | None = None, dtype: "Dtype" = "fp32", base: str | None = None
) -> AdapterResult:
    """Write the adapters of the run's newest step, or of `step`, into the new folder `to`, as `peft` loads them.

    `base` is what adapter_config.json says that they belong on. Raises `CheckpointError`: no such run or step;
    `ExportError`: a run without adapters, no stock architecture, no tokenizer, `to` is taken.
    """
    from moe.checkpoint.read import SavedModel
    from moe.hf import adapter, write

    saved = SavedModel.open(run_dir, step)
    counts = adapter.counted(saved.run)
    if counts is None:
        raise ExportError(
            f"{run_dir} was trained without lora, so it has no adapters. Export the model, without --adapter."
        )
    with write.new_folder(to) as folder:
        written = adapter.write_adapter(
            folder,
            saved.run,
            saved.step,
            saved.adapted(),
            saved.stored,
            run_dir / "tokenizer",
            dtype=dtype,
            base=base,
        )
    assert written.num_parameters == sum(counts.values())
    return AdapterResult(
        str(to), written.architecture, saved.step, dtype, written.num_tensors, written.num_bytes, counts
    )


def _run(
    run_dir: Path, step: int | None, folder: Path, dtype: "Dtype", max_shard_size: int
) -> tuple["Weights", "Written", int | None]:
    from moe.checkpoint import certificate
    from moe.checkpoint.read import SavedModel
    from moe.hf.card import Facts
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
        facts=Facts(
            saved.manifest.data_fingerprint,
            _evaluation(run_dir, saved.step),
            certificate.sentence(page) if page else "",
        ),
    )
    return saved, written, saved.step


def _evaluation(run_dir: Path, step: int) -> dict[str, Any] | None:
    """The record of the last evaluation up to a step; None: there is none, or none that can be read."""
    try:
        rows = records.read(run_dir / "metrics.jsonl").evaluation
    except CheckpointError:
        return None  # a card can do without
    return next((row for row in reversed(rows) if row["step"] <= step), None)


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
@click.option("--max-shard-size", help="Largest weight file.  [default: 5GB]")
@click.option(
    "--verify", is_flag=True, help="Compare logits with stock transformers before the folder appears."
)
@click.option(
    "--adapter", is_flag=True, help="Write the adapters of a LoRA run for peft, instead of the merged model."
)
@click.option("--base", help="With --adapter: name or path of the model that the adapters belong on.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the result to this file too."
)
def command(
    source: Path,
    to: Path,
    step: int | None,
    dtype: "Dtype",
    max_shard_size: str | None,
    verify: bool,
    adapter: bool,
    base: str | None,
    json_path: Path | None,
) -> None:
    """Write the model of a run, or of a folder that `turnout import` made, as one that stock transformers loads.

    The adapters of a LoRA run are merged into its weights, or written alone with --adapter.
    """
    log.setup()
    with clean_exit():
        from moe.hf.write import parse_size

        if json_path is not None:
            figures.check_place(json_path)
        if adapter:
            _refuse({"--max-shard-size": max_shard_size, "--verify": verify}, "--adapter writes no model")
            _write_adapter(source, to, step, dtype, base, json_path)
            return
        _refuse({"--base": base}, "it belongs to --adapter")
        size = parse_size(max_shard_size or "5GB")
        result = export(source, to, step=step, dtype=dtype, max_shard_size=size, verify=verify)
        what = source if result.step is None else f"step {result.step} of {source}"
        click.echo(
            f"exported {what} as {result.architecture} ({result.num_parameters:,} parameters, "
            f"{result.num_bytes / 1e6:,.1f} MB in {len(result.weight_files)} weight files, {dtype}) to {to}"
        )
        if result.trained_by_target is not None:
            click.echo(f"merged its adapters: {_spoken(result.trained_by_target)}")
        if (compared := result.comparison) is not None:
            click.echo(
                f"verified: transformers {compared.transformers} gives the same logits at {compared.num_positions} "
                f"positions: max |difference| {compared.max_difference:.2e} with logits up to "
                f"{compared.logit_scale:.3g}, KL {compared.kl:.1e}"
            )
        if json_path is not None:
            figures.write(json_path, json.dumps(asdict(result), indent=2) + "\n")


def _write_adapter(
    run: Path, to: Path, step: int | None, dtype: "Dtype", base: str | None, json_path: Path | None
) -> None:
    result = export_adapter(run, to, step=step, dtype=dtype, base=base)
    click.echo(
        f"wrote the adapters of step {result.step} of {run} for {result.architecture} ({result.num_bytes / 1e6:,.1f} "
        f"MB, {dtype}) to {to}: {_spoken(result.trained_by_target)}"
    )
    if json_path is not None:
        figures.write(json_path, json.dumps(asdict(result), indent=2) + "\n")


def _spoken(counts: "dict[Target, int]") -> str:
    each = ", ".join(f"{target} {count:,}" for target, count in counts.items())
    return f"{sum(counts.values()):,} trained parameters ({each})"


def _refuse(options: dict[str, object], why: str) -> None:
    for option, value in options.items():
        if value:
            raise ConfigError(f"{option} has no effect here: {why}. Remove it.")


if __name__ == "__main__":
    command()
