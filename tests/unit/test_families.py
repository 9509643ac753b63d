import pytest
import torch

from moe.config import ModelConfig
from moe.errors import ExportError
from moe.hf.convert import check_names, disk_tensors, moves
from moe.hf.families import FAMILIES
from moe.hf.match import check_exportable, family_of
from moe.hf.pages import SpecialTokens, config_page
from tests.stock import CASES, Saved, model, random_weights, run_of

ALL = pytest.mark.parametrize(("model_type", "config"), CASES.values(), ids=CASES)


@ALL
def test_a_model_finds_the_row_that_equals_it(model_type: str, config: ModelConfig) -> None:
    assert family_of(config).model_type == model_type


def test_every_row_of_the_table_has_a_case_here() -> None:
    assert {family.model_type for family in FAMILIES} == {model_type for model_type, _ in CASES.values()}


def test_a_model_can_name_the_row_that_it_becomes() -> None:
    config = CASES["solar_open"][1]
    nameless = config.model_copy(update={"architecture": None})
    assert family_of(config).model_type == "solar_open"
    assert family_of(nameless).model_type == "glm4_moe"  # which comes before it
    with pytest.raises(ExportError, match=r"is no mixtral.*\n *mixtral: model\.moe\.router_score"):
        family_of(config.model_copy(update={"architecture": "mixtral"}))
    with pytest.raises(ExportError, match=r"'bert', which is not in the table.*llama"):
        family_of(config.model_copy(update={"architecture": "bert"}))


@ALL
def test_joining_what_was_split_gives_the_tensor_back(model_type: str, config: ModelConfig) -> None:
    weights = random_weights(config)
    for move in moves(family_of(config), config):
        for number, piece in enumerate(weights[move.ours] if move.stacked else [weights[move.ours]]):
            if move.packed or move.part[1] > 1:
                assert torch.equal(move.from_disk(move.to_disk(piece)), piece)
                continue
            named = list(move.split(number, piece))
            assert tuple(name for name, _ in named) == move.keys(number)
            parts = [part for _, part in named]
            assert all(part.shape == move.disk_shape for part in parts)
            assert torch.equal(move.join(parts), piece)


@ALL
def test_our_transformer_has_exactly_the_names_of_the_plan(model_type: str, config: ModelConfig) -> None:
    from moe.model.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(config)
    ours = {name: tuple(p.shape) for name, p in (*model.named_parameters(), *model.named_buffers())}
    assert ours == {move.ours: move.shape for move in moves(family_of(config), config)}


def test_gate_rows_come_before_up_rows() -> None:
    config = CASES["mixtral"][1]
    weights = random_weights(config)
    disk = dict(disk_tensors(moves(family_of(config), config), Saved(run_of(config), weights).pieces))
    gate_up = weights["layers.1.ffn.experts.gate_up"]
    half = gate_up.shape[1] // 2
    assert torch.equal(disk["model.layers.1.block_sparse_moe.experts.3.w1.weight"], gate_up[3, :half])
    assert torch.equal(disk["model.layers.1.block_sparse_moe.experts.3.w3.weight"], gate_up[3, half:])


@pytest.mark.parametrize(
    ("config", "way_out"),
    [
        (model(moe={"normalize_top_k": False}, qk_norm=False), "mixtral: model.moe.normalize_top_k=true"),
        (model(moe={"normalize_top_k": False}, qk_norm=False), 'qwen3_moe: model.attention.qk_norm="head"'),
        (
            model(
                moe={"shared_expert_intermediate_size": 8},
                qk_norm=False,
                qkv_bias=True,
                attention={"head_dim": 4},
            ),
            "qwen2_moe: model.moe.shared_expert_gate=true",
        ),
        (
            model(moe={}, qk_norm=False, qkv_bias=True, attention={"head_dim": 4}),
            "mixtral: model.attention.qkv_bias=false",
        ),
        (
            model(moe={"shared_expert_intermediate_size": 8}),
            "qwen3_moe: model.moe.shared_expert_intermediate_size=null",
        ),
        (model(moe={"first_k_dense": 1}, qk_norm=False), "mixtral: model.moe.first_k_dense=0"),
        (model(qkv_bias=True), "qwen3: model.attention.output_bias=true"),
        (model(qkv_bias=True), 'qwen2: model.attention.qk_norm="none"'),
        (
            model(
                moe={"shared_expert_intermediate_size": 8, "shared_expert_gate": True},
                qk_norm=False,
                qkv_bias=True,
            ),
            "qwen2_moe: model.attention.head_dim=4",
        ),
        (
            model(qk_norm=False, hidden_size=28, attention={"num_heads": 6}),
            "llama: a model.hidden_size (28) that is a multiple of model.attention.num_heads (6)",
        ),
    ],
)
def test_a_model_without_a_home_is_told_what_would_give_it_one(config: ModelConfig, way_out: str) -> None:
    with pytest.raises(ExportError, match="no stock architecture") as refused:
        check_exportable(config)
    assert way_out in [line.strip() for line in str(refused.value).splitlines()]


def test_the_nearest_home_is_named_first() -> None:
    with pytest.raises(ExportError) as refused:
        check_exportable(model(moe={"first_k_dense": 1, "normalize_top_k": False}, qk_norm=False))
    assert str(refused.value).splitlines()[1].strip() == 'qwen3_moe: model.attention.qk_norm="head"'


def test_a_dense_model_is_offered_dense_homes_only() -> None:
    with pytest.raises(ExportError) as refused:
        check_exportable(model(qkv_bias=True))
    assert "moe" not in str(refused.value)


@ALL
def test_config_json_speaks_both_dialects(model_type: str, config: ModelConfig) -> None:
    page = config_page(
        family_of(config), config, SpecialTokens(eos_token_id=96), dtype="bf16", load_balancing_weight=0.03
    )
    assert page["model_type"] == model_type
    assert page["rope_theta"] == page["rope_parameters"]["rope_theta"] == 1234.0
    assert page["dtype"] == page["torch_dtype"] == "bfloat16"
    assert page["head_dim"] == (config.rotary_dim if config.attention.latent else config.head_dim)
    assert page["tie_word_embeddings"] == config.tie_embeddings
    assert (page["bos_token_id"], page["eos_token_id"], page["pad_token_id"]) == (None, 96, None)
    if config.moe is not None:
        spellings = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        assert {page[key] for key in spellings if key in page} == {config.moe.num_experts}
        assert isinstance(page.get("intermediate_size", 0), int)
        assert page["router_aux_loss_coef"] == pytest.approx(0.03 / config.moe.top_k)
    if model_type.startswith("qwen") and config.moe is not None:
        assert page["mlp_only_layers"] == [n for n in range(3) if n not in config.sparse_layers]
        assert page["norm_topk_prob"] == config.moe.normalize_top_k
        assert page["decoder_sparse_step"] == 1


def test_a_missing_or_an_unknown_weight_is_refused() -> None:
    config = CASES["qwen3_moe"][1]
    plan = moves(family_of(config), config)
    names = [move.ours for move in plan]
    with pytest.raises(ExportError, match=r"lacks norm\.weight"):
        check_names(plan, [name for name in names if name != "norm.weight"])
    with pytest.raises(ExportError, match="holds extra, which"):
        check_names(plan, [*names, "extra"])


def test_a_weight_of_another_shape_or_that_is_not_finite_is_refused() -> None:
    config = CASES["qwen3_moe"][1]
    plan, weights = moves(family_of(config), config), random_weights(config)
    down = "layers.1.ffn.experts.down"

    def refused(name: str, tensor: torch.Tensor, words: str) -> None:
        source = Saved(run_of(config), weights | {name: tensor})
        with pytest.raises(ExportError, match=words):
            list(disk_tensors(plan, source.pieces))

    refused("embed.weight", weights["embed.weight"].T, r"embed.weight is saved with shape \[24, 112\]")
    refused(down, weights[down][:4], r"down is saved with shape \[4, 24, 20\]")
    refused(down, weights[down][[0, 1, 2, 3, 4, 4]], r"down is saved with shape \[6, 24, 20\]")
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = weights[down].clone()
        broken[3, 23, 19] = value
        refused(down, broken, "down holds values that are not finite")
