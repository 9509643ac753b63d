"""`turnout data inspect|verify|stats|sample DIR`: what a data folder holds, and whether it is whole."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from data_prep import folder as folders
from moe.data.shards import TokenData
from moe.errors import DataError, clean_exit

_FOLDER = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
_SPLIT = click.option("--split", default="train", show_default=True, help="Split to read.")


@click.group("data")
def command() -> None:
    """Look into a folder that `turnout prepare` made."""


@command.command()
@_FOLDER
def inspect(folder: Path) -> None:
    """The recipe and the files of DIR."""
    with clean_exit(), _errors_of_the_disk():
        data = TokenData.open(folder, verify=False)
        click.echo(
            f"{folder}: {data.manifest.dtype} ids below {data.vocab_size:,}, fingerprint {data.fingerprint}"
        )
        for split, facts in data.manifest.splits.items():
            for shard in facts.shards:
                click.echo(
                    f"  {split}: {shard.name}  {shard.documents:,} documents  {shard.tokens:,} tokens  "
                    f"{shard.bin.bytes:,} bytes  xxh3 {shard.bin.xxh3_128}"
                )
        click.echo(json.dumps(data.manifest.recipe, indent=2, ensure_ascii=False))


@command.command()
@_FOLDER
def verify(folder: Path) -> None:
    """Compare every byte of DIR with its manifest; name the files and blocks that differ."""
    with clean_exit(), _errors_of_the_disk():
        if not folder.is_dir():
            TokenData.open(folder, verify=False)  # says so
        if found := list(folders.damages(folder)):
            listed = "\n  ".join(found)
            raise DataError(
                f"{folder}: {len(found)} {'file is' if len(found) == 1 else 'files are'} damaged.\n  {listed}\n"
                f"Copy them again, or prepare the data again."
            )
        TokenData.open(folder, verify=True)
        click.echo(f"{folder}: every byte is as the manifest says")


@command.command()
@_FOLDER
def stats(folder: Path) -> None:
    """Documents, tokens, lengths, sources and drops of DIR, as JSON."""
    with clean_exit(), _errors_of_the_disk():
        data = TokenData.open(folder, verify=False)
        click.echo(json.dumps(folders.shares(data), indent=2, ensure_ascii=False))


@command.command()
@_FOLDER
@_SPLIT
@click.option("-n", "count", default=5, show_default=True, type=click.IntRange(1), help="Documents to print.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Another seed, others.")
def sample(folder: Path, split: str, count: int, seed: int) -> None:
    """Some documents of DIR, decoded."""
    with clean_exit(), _errors_of_the_disk():
        data = TokenData.open(folder, verify=False)
        for number, text in folders.sample(data, split, count, seed):
            click.echo(f"--- document {number} of {split}\n{text}")


@contextmanager
def _errors_of_the_disk() -> Iterator[None]:
    """What reading and printing raise as `DataError`; a reader that went away, as in `| head`, is click's business."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DataError(
            f"{error.filename or 'standard output'}: {error.strerror or error}. Check the disk and its permissions."
        ) from None


if __name__ == "__main__":
    command()
