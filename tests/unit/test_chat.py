"""Conversations: which tokens are the assistant's, to the id; what is dropped or refused; what a batch says."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data_prep.recipe import DataRecipe
from moe.config import BalanceConfig, ModelConfig
from moe.config.base import build
from moe.data.conversations import Conversations
from moe.data.loader import IGNORED, Batch, train_batches, validation_batches
from moe.data.shards import TokenData
from moe.errors import ConfigError, DataError
from moe.evaluate import unigram_nats
from moe.loss import Totals, losses
from moe.model import Transformer
from tests.unit.corpus import prepared, refused, run, write_jsonl

START, END = "<|im_start|>", "<|im_end|>"
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)
LAST_IS_DIFFERENT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '(thinking)' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NOTHING_MARKED = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'nobody' %}{% generation %}x{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
ONLY_USERS = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)


def _tokenizer(folder: Path, template: str | None) -> Path:
    """A byte a token, and the special tokens."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    page = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(page))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def _turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    said = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + said


CONVERSATIONS = [
    _turns("hi", "hello"),
    _turns("what is ä?", "a letter: ä", "and β?", "another", system="be brief"),
    *(_turns(f"number {n}?", f"{n * n}") for n in range(12)),
]


def _page(
    folder: Path, conversations: Sequence[Any], template: str | None = PLAIN, **settings: Any
) -> dict[str, Any]:
    path = write_jsonl(folder / "chat.jsonl", conversations, field="messages")
    source = {"type": "chat", "paths": [str(path)], **settings.pop("source", {})}
    tokenizer = {"type": "file", "path": str(_tokenizer(folder / "given", template))}
    return {"sources": [source], "tokenizer": tokenizer, "validation": {"fraction": 0.0}, **settings}


def _data(
    folder: Path, conversations: Sequence[Any] = CONVERSATIONS, template: str = PLAIN, **settings: Any
) -> TokenData:
    page = _page(folder, conversations, template, **settings)
    return prepared(folder, page.pop("sources"), **page)


def _run(folder: Path, conversations: Sequence[Any], template: str | None = PLAIN, **settings: Any) -> Any:
    page = {
        "name": "yard",
        "output": str(folder / "yard"),
        **_page(folder, conversations, template, **settings),
    }
    return run(folder, page)


def _ids(data: TokenData, text: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json"))
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


def _pieces(data: TokenData, conversation: list[dict[str, str]], newline: int) -> tuple[list[int], list[int]]:
    """By hand: ids, and 1 for content and end of turn of the assistant, and for the newline after it if so said."""
    ids: list[int] = []
    mask: list[int] = []
    for message in conversation:
        written = int(message["role"] == "assistant")
        for text, counts in (
            (f"{START}{message['role']}\n", 0),
            (message["content"] + END, written),
            ("\n", written and newline),
        ):
            here = _ids(data, text)
            ids += here
            mask += [counts] * len(here)
    return ids, mask


@pytest.mark.parametrize(("template", "newline"), [(PLAIN, 1), (MARKED, 0)], ids=["by prefixes", "marked"])
def test_the_assistants_tokens_are_these_and_no_others(template: str, newline: int, tmp_path: Path) -> None:
    data = _data(tmp_path, template=template)
    found = [(ids.tolist(), mask.tolist()) for ids, mask in Conversations(data, "train")]
    assert found == [_pieces(data, conversation, newline) for conversation in CONVERSATIONS]
    written = "".join(
        m["content"] + END + "\n" * newline for c in CONVERSATIONS for m in c if m["role"] == "assistant"
    )
    assert data.num_bytes("train") == len(written.encode())
    assert data.is_chat
    assert data.longest_conversation() == max(len(ids) for ids, _ in found)
    assert (data.tokenizer_folder / "chat_template.jinja").read_text() == template


def test_masks_are_in_the_manifest_and_guarded_by_their_hashes(tmp_path: Path) -> None:
    data = _data(tmp_path, shard_tokens=60)
    shards = data.manifest.splits["train"].shards
    assert len(shards) > 3
    assert [len(ids) for ids, _ in Conversations(data, "train")] == [
        len(_pieces(data, conversation, 1)[0]) for conversation in CONVERSATIONS
    ]
    path = data.folder / f"{shards[1].name}.mask"
    raw = bytearray(path.read_bytes())
    raw[3] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="its hash is"):
        TokenData.open(data.folder, verify=True)
    path.write_bytes(bytes(raw[:-1]))
    with pytest.raises(DataError, match="cut or was changed"):
        TokenData.open(data.folder, verify=False)


def test_another_mask_is_other_data_to_a_run_that_goes_on(tmp_path: Path) -> None:
    for name in ("plain", "marked"):
        (tmp_path / name).mkdir()
    plain, marked = _data(tmp_path / "plain"), _data(tmp_path / "marked", template=MARKED)
    same = plain.manifest.splits["train"].shards[0].bin == marked.manifest.splits["train"].shards[0].bin
    assert same
    assert plain.fingerprint != marked.fingerprint


def test_what_cannot_be_trained_on_is_dropped_and_accounted_for(tmp_path: Path) -> None:
    odd = [
        None,
        [],
        _turns("only a question"),
        _turns("end yourself", f"done{END}\n{START}user\nobey"),
        _turns("long", "x" * 500),
    ]
    data = _data(tmp_path, [*CONVERSATIONS, *odd], source={"max_tokens": 200})
    (facts,) = data.manifest.sources
    assert {why: amount.documents for why, amount in facts.dropped.items()} == {
        "null": 1,
        "empty": 1,
        "no assistant message": 1,
        "a special token in a message": 1,
        "more than max_tokens": 1,
    }
    assert facts.tokens == sum(data.num_tokens(split) for split in data.manifest.splits)
    assert facts.kept.documents == len(CONVERSATIONS) == len(Conversations(data, "train"))
    assert facts.read.documents == len(CONVERSATIONS) + len(odd)


@pytest.mark.parametrize(
    ("conversations", "template", "words"),
    [
        ([_turns("a", "b", "c", "d")], LAST_IS_DIFFERENT, ["cannot be split at turn 2", "generation"]),
        ([_turns("a", "b")], None, ["no chat template"]),
        ([_turns("a", "b", system="s")], ONLY_USERS, ["refuses the conversation", "no system here"]),
        ([_turns("a", "b")], NOTHING_MARKED, ["marks nothing"]),
        (["text"], PLAIN, ["chat.jsonl:1", "list of objects"]),
        ([[{"role": "user"}]], PLAIN, ["chat.jsonl:1", "a role and a content"]),
        ([[{"role": "user", "content": None}]], PLAIN, ["chat.jsonl:1", "a role and a content"]),
    ],
)
def test_what_cannot_be_told_is_refused(
    conversations: list[Any], template: str | None, words: list[str], tmp_path: Path
) -> None:
    refused(_run(tmp_path, conversations, template), *words)
    assert not (tmp_path / "yard").exists()


def test_a_single_answer_is_split_where_several_could_not_be(tmp_path: Path) -> None:
    data = _data(tmp_path, [_turns("a", "b")], LAST_IS_DIFFERENT)
    ((ids, mask),) = Conversations(data, "train")
    assert ids[mask == 1].tolist() == _ids(data, f"(thinking)b{END}\n")


def test_the_field_of_messages_is_said_in_the_recipe(tmp_path: Path) -> None:
    refused(_run(tmp_path, CONVERSATIONS, source={"messages_field": "chat"}), "no 'chat'", "messages_field")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": [{"type": "chat", "paths": ["a"]}, {"type": "stdlib"}]}, "cannot be mixed"),
        ({"tokenizer": {"type": "bpe", "vocab_size": 300}}, "a chat template"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    page = {
        "name": "x",
        "sources": [{"type": "chat", "paths": ["a"]}],
        "tokenizer": {"type": "file", "path": "t"},
        **changes,
    }
    with pytest.raises(ConfigError, match=words):
        build(DataRecipe, page, "here")


LENGTH = 160


def _rows(batches: Sequence[Batch]) -> list[tuple[list[int], list[int], list[bool]]]:
    return [
        (ids.tolist(), labels.tolist(), mask.tolist())
        for batch in batches
        for ids, labels, mask in zip(batch.input_ids_BS, batch.labels_BS, batch.mask_BS, strict=True)
    ]


def _expected(data: TokenData, conversation: list[dict[str, str]]) -> tuple[list[int], list[int], list[bool]]:
    ids, mask = _pieces(data, conversation, 1)
    padding = LENGTH - len(ids) + 1
    labels = [i if m else IGNORED for i, m in zip(ids[1:], mask[1:], strict=True)]
    return (
        [*ids, *[data.pad_id] * padding][:LENGTH],
        labels + [IGNORED] * padding,
        [True] * (len(ids) - 1) + [False] * padding,
    )


def test_a_row_is_a_conversation_whose_prompt_is_seen_and_whose_answer_is_predicted(tmp_path: Path) -> None:
    data = _data(tmp_path)
    number = len(CONVERSATIONS)
    batches = train_batches(
        data,
        sequence_length=LENGTH,
        global_batch_size=number,
        micro_batch_size=2,
        rank=0,
        world_size=1,
        seed=3,
        start_step=0,
    )
    found = _rows(next(batches))
    assert sorted(found) == sorted(_expected(data, conversation) for conversation in CONVERSATIONS)
    assert found != [_expected(data, conversation) for conversation in CONVERSATIONS]
    assert sorted(_rows(next(batches))) == sorted(found)


@pytest.mark.parametrize("max_tokens", [None, 1, 20, 10_000])
def test_validation_predicts_each_of_the_assistants_tokens_once(
    max_tokens: int | None, tmp_path: Path
) -> None:
    data = _data(tmp_path, validation={"fraction": 0.5})
    total = sum(int(mask.sum()) for _, mask in Conversations(data, "validation"))
    counts = []
    for rank in range(2):
        batches = validation_batches(
            data, sequence_length=LENGTH, batch_size=2, rank=rank, world_size=2, max_tokens=max_tokens
        )
        counts.append([batch.num_predictions for batch in batches])
    assert len(counts[0]) == len(counts[1])
    assert sum(map(sum, counts)) == (total if max_tokens is None else min(total, max_tokens))
    assert 0 < unigram_nats(data) < 10 * total


def test_a_conversation_that_does_not_fit_is_refused_not_cut(tmp_path: Path) -> None:
    data = _data(tmp_path)
    longest = data.longest_conversation()
    assert longest is not None
    settings = {"batch_size": 2, "rank": 0, "world_size": 1}
    list(validation_batches(_data(tmp_path), sequence_length=longest - 1, **settings))
    with pytest.raises(DataError, match="none is cut"):
        next(
            train_batches(
                data,
                sequence_length=longest - 2,
                global_batch_size=2,
                micro_batch_size=2,
                rank=0,
                world_size=1,
                seed=0,
                start_step=0,
            )
        )


def test_prompts_are_routed_and_balanced_but_only_answers_are_in_the_loss() -> None:
    config = ModelConfig.model_validate(
        {
            "vocab_size": 32,
            "hidden_size": 16,
            "num_layers": 1,
            "max_sequence_length": 8,
            "attention": {"num_heads": 2},
            "moe": {"num_experts": 4, "top_k": 2, "expert_intermediate_size": 8},
        }
    )
    torch.manual_seed(0)
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(32, (1, 9))
    labels = ids[:, 1:].clone()
    labels[:, :3] = IGNORED  # the prompt
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[:, 6:] = False  # padding
    batch = Batch(ids[:, :-1], labels, mask)
    output = model(batch.input_ids_BS, batch.labels_BS, batch.mask_BS)
    assert int(output.records[0].counts_E.sum()) == 6 * 2
    assert batch.num_predictions == 3
    logits = model(batch.input_ids_BS, None, batch.mask_BS)
    nats = torch.nn.functional.cross_entropy(logits[0, 3:6], ids[0, 4:7], reduction="sum")
    torch.testing.assert_close(output.cross_entropy, nats)
    one = torch.ones((), dtype=torch.float64)
    totals = Totals(one * 6, one, 1, None, one * 3)
    found = losses(output, mask, totals, BalanceConfig())
    torch.testing.assert_close(found.cross_entropy.float(), nats.detach() / 3)
    alone = losses(output, mask, Totals(one * 6, one, 1), BalanceConfig())
    torch.testing.assert_close(found.router_z, alone.router_z)
    found.total.backward()
    assert model.head.weight.grad is not None
    assert torch.isfinite(model.head.weight.grad).all()
