"""Documents packed into rows give what each gives on its own: outputs, losses, gradients, routing."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.config import ModelConfig
from moe.data.loader import IGNORED
from moe.model import ModelOutput, Transformer
from moe.model.attend import attend
from moe.model.documents import Documents

LENGTH, VOCABULARY = 40, 32
PACKED = [[17, 1, 3, 19], [40], [5, 8, 21, 2]]
"""Lengths of the documents in each row; the last row ends in padding."""
KINDS: dict[str, dict[str, Any]] = {
    "grouped": {"num_heads": 4, "num_kv_heads": 2},
    "latent": {
        "num_heads": 4,
        "qk_norm": "none",
        "latent": {
            "kv_rank": 8,
            "query_rank": 12,
            "nope_head_dim": 6,
            "rope_head_dim": 4,
            "value_head_dim": 6,
        },
    },
    "windowed": {"num_heads": 4, "num_kv_heads": 2, "sliding_window": 6},
    "sinks": {"num_heads": 4, "num_kv_heads": 2, "sinks": True},
    "windowed sinks": {"num_heads": 4, "num_kv_heads": 2, "sliding_window": 6, "sinks": True},
}


def make(attention: dict[str, Any], *, predictions: int = 0, recompute: Any = "none") -> Transformer:
    page = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_layers": 2,
        "max_sequence_length": LENGTH,
        "attention": attention,
        "moe": {"num_experts": 4, "top_k": 2, "expert_intermediate_size": 8},
        "prediction_depth": predictions,
    }
    model = Transformer(ModelConfig.model_validate(page), recompute=recompute).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def packed() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, labels, mask and documents, as the loader gives them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (len(PACKED), LENGTH), generator=generator)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids, dtype=torch.bool)
    documents = torch.zeros_like(ids, dtype=torch.int32)
    for row, lengths in enumerate(PACKED):
        at = 0
        for number, length in enumerate(lengths):
            labels[row, at : at + length - 1] = ids[row, at + 1 : at + length]
            documents[row, at : at + length] = number
            at += length
        mask[row, :at] = True
        documents[row, at:] = len(lengths)
    labels[0, 40 - 1] = 7  # a document that goes on in another row: its next token is known
    return ids, labels, mask, documents


def pieces() -> list[tuple[int, slice]]:
    found = []
    for row, lengths in enumerate(PACKED):
        at = 0
        for length in lengths:
            found.append((row, slice(at, at + length)))
            at += length
    return found


def gradients(model: Transformer) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("kind", "predictions", "recompute"),
    [
        *((kind, predictions, "none") for kind in KINDS for predictions in (0, 2)),
        ("windowed sinks", 2, "block"),
    ],
)
def test_packed_documents_train_as_each_on_its_own(kind: str, predictions: int, recompute: str) -> None:
    model = make(KINDS[kind], predictions=predictions, recompute=recompute)
    ids, labels, mask, documents = packed()
    together = model(ids, labels, mask, None, documents)
    alone = [
        model(ids[row : row + 1, here], labels[row : row + 1, here], mask[row : row + 1, here])
        for row, here in pieces()
    ]
    assert len(together.records) == 2 + predictions
    for layer, record in enumerate(together.records):
        counts = torch.stack([one.records[layer].counts_E for one in alone]).sum(0)
        assert record.counts_E.tolist() == counts.tolist()
    here, there = _total(together), torch.stack([_total(one) for one in alone]).sum()
    torch.testing.assert_close(here, there)
    if predictions:
        assert float(together.further.detach()) > 0
    here.backward()
    ours = gradients(model)
    there.backward()
    theirs = gradients(model)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-10)


def _total(output: ModelOutput) -> Tensor:
    return output.cross_entropy if output.further is None else output.cross_entropy + output.further


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_packed_documents_are_those_of_each_on_its_own(kind: str) -> None:
    model = make(KINDS[kind])
    ids, _, _, documents = packed()
    together = model(ids, documents_BS=documents)
    for row, here in pieces():
        torch.testing.assert_close(together[row : row + 1, here], model(ids[row : row + 1, here]))
    assert not torch.allclose(together, model(ids))


@given(
    lengths=st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=6), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 20),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_attention_inside_documents_of_any_lengths_is_that_of_each(
    lengths: list[list[int]], window: int | None
) -> None:
    length = max(sum(row) for row in lengths)
    rows = [[*row, length - sum(row)] if sum(row) < length else row for row in lengths]
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(len(rows), length, heads, 4, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    documents = Documents.of(ids, q.device)
    assert (documents is None) == all(len(row) == 1 for row in rows)
    mixed = attend(q, k, v, 0.5, window, documents=documents)
    for number, row in enumerate(rows):
        at = 0
        for size in row:
            here = slice(at, at + size)
            own = [x[number : number + 1, here] for x in (q, k, v)]
            one = attend(own[0], own[1], own[2], 0.5, window)
            torch.testing.assert_close(mixed[number : number + 1, here], one)
            if documents is not None:
                assert documents.positions_BS[number, here].tolist() == list(range(size))
            at += size
    if documents is not None:
        tokens = torch.arange(ids.numel()).view_as(ids)
        room = sum(max(16, 1.5 * size) for row in rows for size in row)
        assert sum(sheet.numel() for sheet in documents.sheets) <= room
        assert torch.equal(
            torch.cat([sheet.flatten() for sheet in documents.sheets])[documents.back_N], tokens.flatten()
        )


def test_rows_of_one_document_cost_nothing() -> None:
    assert Documents.of(torch.zeros(3, 8, dtype=torch.int32), torch.device("cpu")) is None
    assert Documents.of(torch.arange(3)[:, None].expand(3, 8), torch.device("cpu")) is None
