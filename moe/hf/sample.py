"""A stock model, its tokenizer and a prompt -> text, written as it is made."""

from dataclasses import dataclass
from typing import Any

from moe.errors import ConfigError

DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    greedy: bool = False
    """Always the likeliest; the rest then has no effect."""
    temperature: float = 0.8
    top_p: float = 0.95
    """Draw from the likeliest tokens that hold this share of the probability (arXiv:1904.09751)."""
    seed: int = 0


def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int | None, sampling: Sampling) -> str:
    """Continue `prompt`, write it and what follows to stdout as it is made, and return the new text.

    An empty prompt starts a document. `max_new_tokens` None: `DEFAULT_NEW_TOKENS`, or what fits.
    Raises `ConfigError`: prompt and new tokens exceed the model's positions, or an empty prompt with a tokenizer
    that has no token to start from.
    """
    import torch
    import transformers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    input_ids_1S = _encode(tokenizer, prompt).to(device)
    given = input_ids_1S.shape[1]
    max_new_tokens = _check_room(given, max_new_tokens, model.config.max_position_embeddings)
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if not sampling.greedy:
        # top_k: stock generation cuts at 50 tokens unless told not to.
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    end = tokenizer.eos_token_id
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # stock generation draws from the global generators
        torch.manual_seed(sampling.seed)
        output_1S = model.to(device).generate(
            input_ids_1S,
            attention_mask=torch.ones_like(input_ids_1S),
            max_new_tokens=max_new_tokens,
            streamer=transformers.TextStreamer(tokenizer, skip_special_tokens=True),
            eos_token_id=end,
            pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **choice,
        )
    text: str = tokenizer.decode(output_1S[0, given:], skip_special_tokens=True)
    return text


def _check_room(given: int, wanted: int | None, longest: int) -> int:
    """How many tokens to make after `given` ones in `longest` positions."""
    if longest < 2:
        raise ConfigError(
            f"the model has {longest} position: it cannot hold a prompt and a new token. Use another model."
        )
    room = longest - given
    if room < 1:
        raise ConfigError(
            f"the prompt has {given} tokens, but the model has {longest} positions, and a new token needs one. "
            f"Cut the prompt to at most {longest - 1} tokens."
        )
    if wanted is not None and wanted > room:
        raise ConfigError(
            f"the prompt has {given} tokens and --max-new-tokens is {wanted}, but the model has "
            f"{longest} positions. Use --max-new-tokens {room} or less, or a shorter prompt."
        )
    return min(DEFAULT_NEW_TOKENS, room) if wanted is None else wanted


def _encode(tokenizer: Any, prompt: str) -> Any:
    import torch

    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        # A new document: what stands before one in training is the end of the last.
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise ConfigError(
                "the prompt is empty, and the tokenizer has no token to start from: give a --prompt."
            )
        ids = [start]
    return torch.tensor([ids])
