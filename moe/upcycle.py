"""A dense Hugging Face folder -> a sparse one that is the same function: `turnout upcycle DENSE --to DIR`."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe import figures, log
from moe.errors import ExportError, clean_exit

if TYPE_CHECKING:
    from moe.hf.pages import Dtype
    from moe.hf.targets import Options
    from moe.hf.upcycle import Upcycled, Weights
    from moe.hf.verify import Comparison

LARGEST_KL = 1e-6
"""Nats a position between an exactly upcycled model and its dense one: what float32 leaves."""


@dataclass(frozen=True)
class UpcycleResult:
    """A sparse model that is in its place."""

    folder: str
    architecture: str
    num_experts: int
    top_k: int
    expert_intermediate_size: int
    num_parameters: int
    active_parameters: int
    """Used for one token."""
    num_bytes: int
    """Of the weights."""
    weight_files: tuple[str, ...]
    exact: bool
    """Whether it is the dense model's function, but for rounding."""
    why_not: tuple[str, ...]
    """What changes the function; empty if it is exact."""
    comparison: "Comparison | None"
    """Stock transformers on the sparse model against ours on the dense one; None unless verified."""


def upcycle(
    dense: "Weights",
    source: Path,
    to: Path,
    options: "Options",
    *,
    dtype: "Dtype" = "fp32",
    max_shard_size: int = 5 * 10**9,
    verify: bool = False,
) -> UpcycleResult:
    """Write what `options` make of `dense` into the new folder `to`, with the tokenizer of its folder `source`.

    The folder appears when it is whole and, with `verify` and an exact recipe, equal to the dense model under stock
    transformers. Raises `ConfigError`: options that do not go together or with the model; `ExportError`: no tokenizer,
    `to` is taken, or the logits differ.
    """
    from moe.hf import verify as verification
    from moe.hf import write
    from moe.hf.upcycle import Upcycled
    from moe.model.count import count

    sparse = Upcycled(dense, options)
    moe, counted = sparse.model.moe, count(sparse.model, 1)
    assert moe is not None, "it is sparse"
    why_not = (*options.why_not_exact(), *_rounding(options, dtype))
    with write.new_folder(to) as folder:
        written = write.write_model(
            folder,
            sparse.model,
            sparse.names(),
            sparse.pieces,
            source,
            card(sparse, source.absolute().name, to.name, why_not, dtype),
            dtype=dtype,
            max_shard_size=max_shard_size,
        )
        if (generation := source / "generation_config.json").is_file():
            shutil.copy(generation, folder / generation.name)  # it may know more than the tokenizer does
        compared = verification.measure(folder, dense.model, dense.pieces, dtype) if verify else None
        if compared is not None:
            _judge(compared, exact=not why_not)
    return UpcycleResult(
        folder=str(to),
        architecture=written.family.architecture,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        expert_intermediate_size=moe.expert_intermediate_size,
        num_parameters=written.num_parameters,
        active_parameters=counted.active_parameters,
        num_bytes=written.num_bytes,
        weight_files=written.weight_files,
        exact=not why_not,
        why_not=why_not,
        comparison=compared,
    )


def card(sparse: "Upcycled", source: str, name: str, why_not: tuple[str, ...], dtype: "Dtype") -> str:
    """README.md: what was made of what, and how; folders are named without their places."""
    moe, options = sparse.model.moe, sparse.options
    assert moe is not None
    rows = {
        "architecture": f"`{sparse.family.architecture}`",
        "experts": f"{moe.num_experts} in each of {len(sparse.model.sparse_layers)} layers, {moe.top_k} a token",
        "an expert": f"{moe.expert_intermediate_size} inner columns: "
        + (
            "a copy of the dense block (arXiv:2212.05055)"
            if options.granularity == 1
            else f"1/{options.granularity} of the dense block, in virtual groups (arXiv:2410.07524)"
        ),
        "noise": f"{options.noise:g} standard deviations",
        "drawn anew": f"{options.drop:.0%} of the inner columns (arXiv:2502.19261)",
        "routers": f"random, standard deviation "
        f"{sparse.model.init_std if options.router_std is None else options.router_std:g}, seed {options.seed}",
        "the dense model's function": "yes, but for rounding" if not why_not else f"no: {'; '.join(why_not)}",
        "weights": dtype,
    }
    if not options.noise:
        del rows["noise"]
    if not options.drop:
        del rows["drawn anew"]
    if options.shared_expert_size is not None:
        rows["shared expert"] = f"the first {options.shared_expert_size} inner columns of the dense block"
    if options.first_k_dense:
        rows["dense layers"] = f"the first {options.first_k_dense}"
    table = "\n".join(f"| {row} | {value} |" for row, value in rows.items())
    return _CARD.format(name=name, source=source, table=table)


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

Made of the dense model `{source}` by turnout (`turnout upcycle`), and not trained since: its experts know no more than
that model does, until it is. The licence of `{source}` goes for it too.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""


def _rounding(options: "Options", dtype: "Dtype") -> tuple[str, ...]:
    granularity = options.granularity
    if dtype == "bf16" and granularity & (granularity - 1):
        return (f"bf16 rounds down_proj times {granularity}, which is no power of two",)
    return ()


def _judge(compared: "Comparison", *, exact: bool) -> None:
    if compared.wrong_keys:
        raise ExportError(
            f"transformers {compared.transformers} does not find these names as they should be: "
            f"{', '.join(compared.wrong_keys[:5])}. Nothing was written. Please report the command as a bug."
        )
    if exact and not abs(compared.kl) < LARGEST_KL:
        raise ExportError(
            f"the recipe should keep the dense model's function, but transformers {compared.transformers} finds a KL "
            f"of {compared.kl:.1e} (allowed {LARGEST_KL:.0e}; logits differ by up to {compared.max_difference:.3g}): "
            f"nothing was written. Please report the command as a bug."
        )


@click.command("upcycle")
@click.argument("dense", metavar="DENSE_DIR", type=click.Path(path_type=Path))
@click.option(
    "--to", type=click.Path(path_type=Path), required=True, help="Folder to make; never overwritten."
)
@click.option("--num-experts", type=int, required=True, help="Experts in a sparse layer.")
@click.option("--top-k", type=int, required=True, help="Experts that each token visits.")
@click.option(
    "--granularity",
    type=int,
    default=1,
    show_default=True,
    help="Shards that the dense block is cut into; 1: experts are copies.",
)
@click.option("--shared-expert-size", type=int, help="Inner columns for an expert that every token visits.")
@click.option("--first-k-dense", type=int, default=0, show_default=True, help="Layers that stay dense.")
@click.option(
    "--noise", type=float, default=0.0, show_default=True, help="Added to experts, in their deviations."
)
@click.option(
    "--drop", type=float, default=0.0, show_default=True, help="Share of an expert's columns drawn anew."
)
@click.option("--router-std", type=float, help="Deviation of the routers' weights. [the model's init_std]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--family", help="Architecture to become, such as qwen3_moe. [the first that fits]")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file.")
@click.option("--verify", is_flag=True, help="Compare with the dense model before the folder appears.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the result to this file too."
)
def command(
    dense: Path,
    to: Path,
    dtype: "Dtype",
    max_shard_size: str,
    verify: bool,
    json_path: Path | None,
    **choices: Any,
) -> None:
    """Make a sparse model of the dense one in the Hugging Face folder DENSE_DIR."""
    log.setup()
    with clean_exit():
        from moe.hf.folder import HFFolder
        from moe.hf.targets import Options
        from moe.hf.write import parse_size

        if json_path is not None:
            figures.check_place(json_path)
        result = upcycle(
            HFFolder.open(dense),
            dense,
            to,
            Options(**choices),
            dtype=dtype,
            max_shard_size=parse_size(max_shard_size),
            verify=verify,
        )
        _tell(result, dense, dtype)
        if json_path is not None:
            figures.write(json_path, json.dumps(asdict(result), indent=2) + "\n")


def _tell(result: UpcycleResult, dense: Path, dtype: "Dtype") -> None:
    click.echo(
        f"upcycled {dense} into {result.architecture} with {result.num_experts} experts of width "
        f"{result.expert_intermediate_size}, {result.top_k} a token ({result.num_parameters:,} parameters, "
        f"{result.active_parameters:,} of them for a token; {result.num_bytes / 1e6:,.1f} MB in "
        f"{len(result.weight_files)} weight files, {dtype}) in {result.folder}"
    )
    if result.exact:
        click.echo("exact: but for rounding it is the dense model's function")
    else:
        click.echo(f"not exact: {'; '.join(result.why_not)}")
    if (compared := result.comparison) is not None:
        click.echo(
            f"{'verified' if result.exact else 'measured'}: transformers {compared.transformers} on the sparse model, "
            f"ours on the dense one, {compared.num_positions} positions: KL {compared.kl:.1e} nats, max |difference| "
            f"of logits {compared.max_difference:.2e} with logits up to {compared.logit_scale:.3g}"
        )


if __name__ == "__main__":
    command()
