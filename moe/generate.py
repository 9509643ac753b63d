"""A run or a Hugging Face folder and a prompt -> text, as it comes: `turnout generate RUN --prompt "..."`."""

from pathlib import Path

import click

from moe import log
from moe.errors import ConfigError, clean_exit
from moe.hf.load import open_model
from moe.hf.sample import DEFAULT_NEW_TOKENS, Sampling, generate

_TEMPERATURES = 1e-3, 1e3
"""Beyond these, logits over temperature leave float32's range or its resolution: greedy, or a fair die."""

_LAST_SEED = 2**63 - 1


@click.command("generate")
@click.argument("source", metavar="RUN_OR_DIR", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to continue; empty: a new document.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help=f"{DEFAULT_NEW_TOKENS} if not given, or what the model has positions for.",
)
@click.option("--temperature", type=float, help="Divides the logits; 0.8 if not given.")
@click.option("--top-p", type=float, help="Share of the probability to draw from; 0.95 if not given.")
@click.option("--seed", type=click.IntRange(0, _LAST_SEED), help="Of the drawing; 0 if not given.")
@click.option("--greedy", is_flag=True, help="Always take the likeliest token.")
def command(
    source: Path,
    prompt: str,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    greedy: bool,
) -> None:
    """Continue a prompt with the model of a run, a Hugging Face folder, or one that `turnout import` made."""
    log.setup()
    with clean_exit():
        sampling = choose_sampling(greedy=greedy, temperature=temperature, top_p=top_p, seed=seed)
        _check_prompt(prompt)
        model, tokenizer = open_model(source)
        generate(model, tokenizer, prompt, max_new_tokens, sampling)


def choose_sampling(
    *, greedy: bool, temperature: float | None, top_p: float | None, seed: int | None
) -> Sampling:
    """Options as given -> `Sampling`; raises `ConfigError` if they contradict each other or their rules."""
    given = {"temperature": temperature, "top_p": top_p, "seed": seed}
    set_ones = {name: value for name, value in given.items() if value is not None}
    if greedy and set_ones:
        name, value = next(iter(set_ones.items()))
        raise ConfigError(
            f"--{name.replace('_', '-')} is {value}, but --greedy draws nothing, so it has no effect. "
            f"Remove one of the two."
        )
    coldest, hottest = _TEMPERATURES
    if temperature is not None and not coldest <= temperature <= hottest:
        raise ConfigError(
            f"--temperature is {temperature}: it must lie between {coldest:g} and {hottest:g}. "
            f"Use --greedy for no randomness."
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p is {top_p}: it is a share of the probability, above 0 and at most 1.")
    return Sampling(greedy=greedy, **set_ones)  # type: ignore[arg-type]  # a mapping of mixed values


def _check_prompt(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError:  # how bytes on the command line that are no UTF-8 arrive
        raise ConfigError(f"--prompt is {prompt!a:.60}: it must be text in UTF-8. Convert it.") from None


if __name__ == "__main__":
    command()
