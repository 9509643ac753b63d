"""Conversations -> token ids, and which of them the assistant wrote, by the tokenizer's chat template.

A template that marks what is generated ({% generation %}) says so itself. Of any other, the assistant's turns are found
as what the template adds: the tokens of the conversation up to a turn's end, without those up to its beginning, prompt
for the answer included. That is sound only if the shorter one begins the longer one, token by token, which is checked
for every turn of every conversation.
"""

import json
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from data_prep.documents import EMPTY, NULL, Document, Dropped
from moe.errors import DataError

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NO_ANSWER = "no assistant message"
_SPECIAL = "a special token in a message"
_LONG = "more than max_tokens"


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens."""

    ids: list[int]
    mask: list[int]
    """1 for what the assistant wrote, its end of turn included; never the first, which nothing predicts."""
    num_bytes: int
    """UTF-8 bytes of what the assistant wrote."""


def conversation(messages: Any, num_bytes: int, where: str) -> Document | Dropped:
    """A list of messages -> a document of `num_bytes`, its text their JSON; raises `DataError` if it is none."""
    if messages is None:
        return Dropped(NULL, num_bytes)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(
            f"{where}: the messages are {messages!r:.60}, but they must be a list of objects with role and content. "
            f"Mend the line, or set the source's messages_field."
        )
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise DataError(
                f"{where}: a message is {message!r:.60}, but each must have a role and a content, both strings. "
                f"Mend the line."
            )
    if not messages:
        return Dropped(EMPTY, num_bytes)
    if not any(message["role"] == "assistant" for message in messages):
        return Dropped(_NO_ANSWER, num_bytes)
    return Document(json.dumps(messages, ensure_ascii=False), num_bytes)


class ChatTokenizer:
    """A tokenizer folder with a chat template. Raises `DataError` if it has none."""

    def __init__(self, folder: Path) -> None:
        import transformers  # seconds that other sources need not pay

        transformers.logging.set_verbosity_error()
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever a damaged folder makes of half a dozen libraries
            raise DataError(
                f"tokenizer.path: `transformers` cannot load this tokenizer ({_brief(error)}). Save it again."
            ) from None
        template = self._tokenizer.chat_template
        if not isinstance(template, str):
            raise DataError(
                "tokenizer.path: this tokenizer has no chat template (a chat_template.jinja in its folder, or "
                "chat_template in tokenizer_config.json), so it does not say how messages become text. Use the "
                "tokenizer of a chat model, or add a template."
            )
        self._is_marked = _MARKED.search(template) is not None
        self._special = sorted({str(token) for token in self._tokenizer.added_tokens_decoder.values()})

    def encode(self, document: Document, max_tokens: int | None = None) -> Encoded | Dropped:
        """Of a `conversation`. Raises `DataError` if the template refuses it, or does not say what was written."""
        messages = json.loads(document.text)
        if any(token in message["content"] for message in messages for token in self._special):
            # It would become the real token: a message could end its own turn and speak for others.
            return Dropped(_SPECIAL, document.num_bytes)
        ids, mask = (self._marked if self._is_marked else self._by_prefixes)(messages)
        mask[0] = 0
        if max_tokens is not None and len(ids) > max_tokens:
            return Dropped(_LONG, document.num_bytes)
        if not any(mask):
            raise DataError(
                f"tokenizer.path: the chat template marks nothing as the assistant's in {_shown(messages)}. Put "
                f"{{% generation %}} and {{% endgeneration %}} around all that it generates."
            )
        return Encoded(ids, mask, self._written(ids, mask))

    def _marked(self, messages: list[Any]) -> tuple[list[int], list[int]]:
        page = self._apply(messages, return_dict=True, return_assistant_tokens_mask=True)
        return list(page["input_ids"]), list(page["assistant_masks"])

    def _by_prefixes(self, messages: list[Any]) -> tuple[list[int], list[int]]:
        ids = self._ids(messages)
        mask = [0] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._ids(messages[:turn], add_generation_prompt=True)
            until = self._ids(messages[: turn + 1])
            if until[: len(before)] != before or ids[: len(until)] != until:
                raise DataError(
                    f"tokenizer.path: the chat template cannot be split at turn {turn + 1} of {_shown(messages)}: with "
                    f"later messages it writes earlier ones in another way, so that it cannot be told which tokens the "
                    f"assistant wrote. Use a template with {{% generation %}}."
                )
            mask[len(before) : len(until)] = [1] * (len(until) - len(before))
        return ids, mask

    def _ids(self, messages: list[Any], **options: bool) -> list[int]:
        return list(self._apply(messages, return_dict=False, **options))

    def _apply(self, messages: list[Any], **options: bool) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=True, **options)
        except Exception as error:  # a template may raise anything, and does, for roles that it does not know
            raise DataError(
                f"the tokenizer's chat template refuses {_shown(messages)} ({_brief(error)}). Mend the conversation, "
                f"or use another tokenizer."
            ) from None

    def _written(self, ids: list[int], mask: list[int]) -> int:
        runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
        texts = (
            self._tokenizer.decode([token for token, _ in run]) for is_written, run in runs if is_written
        )
        return sum(len(text.encode()) for text in texts)


def _shown(messages: list[Any]) -> str:
    return f"the conversation {json.dumps(messages, ensure_ascii=False):.80}"


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
