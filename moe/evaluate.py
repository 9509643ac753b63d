"""A saved run -> its loss on the held-out split, in nats per token and bits per byte, beside a unigram model's."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch

from moe import figures, log
from moe.checkpoint.read import SavedModel
from moe.config import RunConfig, cautions, check_data
from moe.data.conversations import Conversations
from moe.data.loader import validation_batches
from moe.data.shards import TokenData
from moe.errors import CheckpointError, ConfigError, DataError, clean_exit
from moe.hf import beginning
from moe.loss import local_load
from moe.model import Transformer, initialize
from moe.model.source import copy
from moe.recipe import load

_UNIGRAM_BLOCK = 1 << 22


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures; every token of the split is predicted once, from at most sequence_length before it; but for
    the first of a document where documents do not see each other.
    """

    step: int
    loss: float
    """Nats per token."""
    bits_per_byte: float
    """Of the documents' UTF-8 text; the ends of documents are predicted too. Of chat: of what the assistant wrote."""
    unigram_bits_per_byte: float
    """Of a model that knows only the training split's token frequencies (add one)."""
    tokens: int
    bytes: int
    tokens_per_expert: list[list[int]] | None = None
    """Choices of each sparse layer's experts over the split; None for a dense model."""


def evaluate(run_folder: Path, step: int | None = None, batch_size: int = 16) -> Evaluation:
    """Evaluate a checkpoint (None: the newest) of a run on this machine, in float32.

    Step 0 is the model that training began with: drawn again from the recipe's seed, or read again from its init_from.
    Raises `CheckpointError` or `DataError`.
    """
    run, model, step = _load(run_folder, step)
    for caution in cautions(run.model):
        log.get().warning(caution)
    data = TokenData.open(Path(run.data.path), verify=run.data.verify_hashes)
    check_data(run, data)
    if not data.num_tokens("validation"):
        raise DataError(
            f"{run.data.path} has no validation split, so there is nothing to evaluate on. "
            f"Prepare it with validation.fraction above 0."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    nats, tokens, load_LE = 0.0, 0, None
    batches = validation_batches(
        data,
        sequence_length=run.data.sequence_length,
        batch_size=batch_size,
        rank=0,
        world_size=1,
        packing=run.data.packing,
        attend_across_documents=run.data.attend_across_documents,
    )
    with torch.no_grad():
        for batch in batches:
            output = model(*batch.on(device).inputs())
            nats += float(output.cross_entropy)
            tokens += batch.num_predictions
            if (here_LE := local_load(output)) is not None:
                load_LE = here_LE[:, :-1] + (0 if load_LE is None else load_LE)
    num_bytes = data.num_bytes("validation")
    return Evaluation(
        step=step,
        loss=nats / tokens,
        bits_per_byte=nats / math.log(2) / num_bytes,
        unigram_bits_per_byte=unigram_nats(data, apart=not run.data.attend_across_documents)
        / math.log(2)
        / num_bytes,
        tokens=tokens,
        bytes=num_bytes,
        tokens_per_expert=None if load_LE is None else load_LE.tolist(),
    )


def unigram_nats(data: TokenData, *, apart: bool = False) -> float:
    """Nats, summed over the same predictions, of the training split's token frequencies with one added to each.

    `apart`: documents do not see each other, so that nothing predicts their first tokens.
    """
    counts = _counts(data, "train", 0) + 1
    # The first token of the split is predicted by nobody.
    predicted = _counts(data, "validation", 1)
    if apart and not data.is_chat:
        predicted -= _first_tokens(data, "validation")
    return float(-(predicted * np.log(counts / counts.sum())).sum())


def _counts(data: TokenData, split: str, start: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    counts = np.zeros(data.vocab_size, dtype=np.int64)
    if data.is_chat:
        for ids_N, written_N in Conversations(data, split):
            counts += np.bincount(ids_N[written_N == 1], minlength=data.vocab_size)
        return counts
    end = data.num_tokens(split)
    for begin in range(start, end, _UNIGRAM_BLOCK):
        tokens = data.tokens(split, begin, min(begin + _UNIGRAM_BLOCK, end))
        counts += np.bincount(tokens, minlength=data.vocab_size)
    return counts


def _first_tokens(data: TokenData, split: str) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Counts of the tokens that all documents but the split's first begin with."""
    length_D = data.document_lengths(split)
    starts = (np.cumsum(length_D) - length_D)[length_D > 0][1:].tolist()
    firsts = [int(data.tokens(split, start, start + 1)[0]) for start in starts]
    return np.bincount(np.array(firsts, dtype=np.int64), minlength=data.vocab_size)


def _load(run_folder: Path, step: int | None) -> tuple[RunConfig, Transformer, int]:
    if step == 0:
        recipe = run_folder / "recipe.yaml"
        if not recipe.is_file():
            raise CheckpointError(f"{run_folder} holds no run (no recipe.yaml). Give the folder of a run.")
        run = load(RunConfig, recipe)
        model = Transformer(run.model)
        if (weights := beginning.begin(run, verify=True)) is not None:
            copy(model, "", weights)
        else:
            initialize(model, run.seed)
        return run, model, 0
    saved = SavedModel.open(run_folder, step)
    model = Transformer(saved.run.model)
    saved.into(model)
    return saved.run, model, saved.step


@click.command("evaluate")
@click.argument("source", metavar="RUN_OR_DIR", type=click.Path(path_type=Path))
@click.option(
    "--step", type=click.IntRange(min=0), help="Checkpoint to evaluate; 0: before any training. [newest]"
)
@click.option(
    "--tasks", help="Tasks of lm-evaluation-harness, comma-separated, instead of the held-out split."
)
@click.option(
    "--include-path", type=click.Path(path_type=Path), help="Folder with further tasks; with --tasks."
)
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples before a question. [the task's]")
@click.option("--limit", type=click.IntRange(min=1), help="Questions of each task. [all]")
@click.option("--batch-size", type=click.IntRange(min=1), help="Texts at a time. [16; with --tasks 8]")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the figures to this file too."
)
def command(
    source: Path,
    step: int | None,
    tasks: str | None,
    include_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int | None,
    json_path: Path | None,
) -> None:
    """Held-out loss and bits per byte of the run in folder RUN_OR_DIR.

    With --tasks, what lm-evaluation-harness measures of a run, a Hugging Face folder, or one that `turnout import`
    made.
    """
    with clean_exit():
        log.setup()
        if json_path is not None:
            figures.check_place(json_path)
        if tasks is not None:
            page = _tasks(source, step, tasks, include_path, num_fewshot, limit, batch_size or 8)
        else:
            for name, value in (
                ("include-path", include_path),
                ("num-fewshot", num_fewshot),
                ("limit", limit),
            ):
                if value is not None:
                    raise ConfigError(
                        f"--{name} is {value}, but it belongs to --tasks. Set both, or neither."
                    )
            page = _held_out(source, step, batch_size or 16)
        if json_path is not None:
            figures.write(json_path, page + "\n")


def _held_out(run: Path, step: int | None, batch_size: int) -> str:
    found = evaluate(run, step, batch_size)
    click.echo(
        f"step {found.step}: {found.loss:.4f} nats/token, {found.bits_per_byte:.4f} bits/byte "
        f"(unigram model: {found.unigram_bits_per_byte:.4f}) over {found.tokens:,} tokens, {found.bytes:,} bytes"
    )
    return json.dumps(asdict(found))


def _tasks(
    source: Path,
    step: int | None,
    tasks: str,
    include_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
) -> str:
    from moe.hf.load import open_model
    from moe.hf.tasks import check_installed, measure

    check_installed()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    scores = measure(
        *open_model(source, step),
        names,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
    )
    for score in scores:
        error = "" if score.standard_error is None else f" +- {score.standard_error:.4f}"
        click.echo(f"{score.task}: {score.metric} {score.value:.4f}{error}")
    return json.dumps({"source": str(source), "scores": [asdict(score) for score in scores]})


if __name__ == "__main__":
    command()
