"""Memory of big tensors that is kept for the next ones."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from moe.config import AttentionConfig, ModelConfig, MoEConfig
from moe.model import Transformer
from moe.sparse import ExpertLayout, SparseMoE
from moe.sparse import spare as spares
from moe.sparse.spare import Spare

BIG = torch.empty(1, spares.LEAST_BYTES // 4)


def _empty(spare: Spare) -> Tensor:
    return spare.empty("gradient", BIG.shape, BIG)


def test_the_next_of_its_name_gets_the_memory_of_what_was_released() -> None:
    spare = Spare()
    first = _empty(spare)
    assert (first.shape, first.dtype, first.stride()) == (BIG.shape, BIG.dtype, BIG.stride())
    assert first.grad_fn is None
    assert not first._is_view()
    place = first.data_ptr()
    assert place % 64 == 0
    assert _empty(spare).data_ptr() != place  # it is in use; and this one is released at once
    view = first.view(2, -1)[1:]
    del first
    assert _empty(spare).data_ptr() != place  # some of it is
    view.fill_(1)
    del view
    assert len(spare._memory) == 1  # two were released
    (memory,) = spare._memory.values()
    again = _empty(spare)
    assert again.data_ptr() == memory.data_ptr()
    assert not spare._memory


def test_one_of_each_name_is_kept() -> None:
    spare = Spare()
    held = [_empty(spare) for _ in range(3)]
    places = {tensor.data_ptr() for tensor in held}
    del held
    assert len(spare._memory) == 1
    assert _empty(spare).data_ptr() in places
    spare.empty("another", BIG.shape, BIG)
    assert spare._memory.keys() == {"gradient", "another"}


def test_what_is_kept_serves_what_is_little_smaller_and_gives_way_to_the_rest() -> None:
    spare = Spare()
    rows = 5 * spares.LEAST_BYTES // 4 // 4
    sizes = []
    for wanted in (rows, rows - rows // 10, rows, rows + 1, rows, spares.LEAST_BYTES // 4):
        tensor = spare.empty("rows", (wanted, 1), BIG)
        assert tensor.shape == (wanted, 1)
        tensor.fill_(1)
        del tensor
        sizes.append(spare._memory["rows"].numel() // 4)
    assert sizes == [rows, rows, rows, rows + 1, rows + 1, spares.LEAST_BYTES // 4]


@pytest.mark.parametrize("weight", [torch.empty(10, 10), torch.empty(1, spares.LEAST_BYTES, device="meta")])
def test_others_are_torchs(weight: Tensor) -> None:
    spare = Spare()
    assert spare.empty("some", weight.shape, weight).shape == weight.shape
    assert not spare._memory


def test_a_copy_shares_nothing() -> None:
    spare = Spare()
    _empty(spare)
    for other in (copy.deepcopy(spare), pickle.loads(pickle.dumps(spare))):
        assert isinstance(other, Spare)
        assert not other._memory
    assert len(spare._memory) == 1


def test_what_outlives_its_spare_is_whole() -> None:
    kept = _empty(Spare()).fill_(3)
    torch.empty_like(BIG).fill_(4)
    assert bool((kept == 3).all())


def test_gradients_of_steps_are_right_and_lie_where_the_last_ones_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spares, "LEAST_BYTES", 1)
    torch.manual_seed(1)
    config = MoEConfig(num_experts=4, top_k=2, expert_intermediate_size=5)
    layer = SparseMoE(6, config, ExpertLayout(4))
    plain = copy.deepcopy(layer)
    for parameter in (*layer.parameters(),):
        torch.nn.init.normal_(parameter)
    plain.load_state_dict(layer.state_dict())
    places = []
    for number in range(4):
        x = torch.randn(9, 6)
        for each, least in ((layer, 1), (plain, 1 << 40)):
            monkeypatch.setattr(spares, "LEAST_BYTES", least)
            each.zero_grad(set_to_none=number != 2)  # one step adds to what is there
            each(x)[0].square().sum().backward()
        for ours, right in zip(layer.parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None
            assert torch.equal(ours.grad, right.grad)  # type: ignore[arg-type]  # as above
        grad = layer.experts.gate_up.grad
        assert grad is not None
        places.append(grad.data_ptr())
        del grad
    assert places[0] == places[1]
    assert len(set(places)) <= 2  # the sum is held while what is added comes


def test_layers_of_a_model_share_one() -> None:
    moe = MoEConfig(num_experts=4, top_k=2, expert_intermediate_size=5)
    heads = AttentionConfig(num_heads=2, num_kv_heads=2)
    model = Transformer(ModelConfig(vocab_size=32, hidden_size=8, num_layers=3, attention=heads, moe=moe))
    found = {id(layer.experts.spare) for layer in model.modules() if isinstance(layer, SparseMoE)}
    assert len(found) == 1
    other = copy.deepcopy(model)
    assert {id(layer.experts.spare) for layer in other.modules() if isinstance(layer, SparseMoE)}.isdisjoint(
        found
    )
