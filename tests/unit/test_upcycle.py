import gc
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ["HF_HUB_OFFLINE"] = "1"

from moe import upcycle as verb
from moe.bench.upcycle import Plan
from moe.config import ModelConfig, RunConfig
from moe.errors import ConfigError, ExportError
from moe.hf import compare, verify
from moe.hf.folder import HFFolder
from moe.hf.targets import Options, target
from moe.hf.upcycle import Upcycled
from moe.hf.verify import Comparison, our_logits, save_reference
from moe.recipe import load
from moe.upcycle import LARGEST_KL, upcycle
from tests.dense import write_dense
from tests.stock import CASES, Saved, random_weights, run_of

# All matrices are square, and there are as many experts as columns: a transposition fits anywhere.
SQUARE = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}

EXACT: dict[str, tuple[str, dict[str, Any], Options, str]] = {
    "copies of llama": ("llama", {}, Options(8, 2), "mixtral"),
    "granular llama": ("llama", {}, Options(12, 8, 4), "mixtral"),
    "granular llama by thirds, all experts visited": ("llama", {}, Options(6, 6, 3), "mixtral"),
    "copies of qwen3": ("qwen3", {"head_dim": 8}, Options(5, 3), "qwen3_moe"),
    "granular qwen3, tied, one group a token": (
        "qwen3",
        {"head_dim": 8, "tie_word_embeddings": True},
        Options(16, 4, 4),
        "qwen3_moe",
    ),
    "granular qwen3, first layer dense": ("qwen3", {}, Options(6, 4, 2, first_k_dense=1), "qwen3_moe"),
    "copies of qwen2 with a shared expert": (
        "qwen2",
        {},
        Options(4, 2, shared_expert_size=12),
        "qwen2_moe",
    ),
    "granular qwen2 with a shared expert": (
        "qwen2",
        {},
        Options(8, 4, 2, shared_expert_size=4),
        "qwen2_moe",
    ),
    "granular olmo2": ("olmo2", {}, Options(8, 4, 2), "flex_olmo"),
    "olmo2 in copies": ("olmo2", {}, Options(4, 2), "flex_olmo"),
    "sigmoid scores, a selection bias and a shared expert, llama": (
        "llama",
        {},
        Options(8, 4, 2, family="solar_open", shared_expert_size=12),
        "solar_open",
    ),
    "sigmoid scores, a selection bias and a shared expert, qwen3": (
        "qwen3",
        {"head_dim": 8},
        Options(8, 4, 2, family="glm4_moe", shared_expert_size=12),
        "glm4_moe",
    ),
    "the same, another name": (
        "qwen3",
        {"head_dim": 8},
        Options(8, 4, 2, family="dots1", shared_expert_size=12),
        "dots1",
    ),
    "softmax scores and a selection bias": (
        "llama",
        {},
        Options(8, 4, 2, family="ernie4_5_moe"),
        "ernie4_5_moe",
    ),
    "square llama": ("llama", SQUARE, Options(16, 4), "mixtral"),
    "square qwen3, granular, square experts": (
        "qwen3",
        SQUARE | {"intermediate_size": 64},
        Options(16, 8, 4),
        "qwen3_moe",
    ),
}
"""What it shows -> (source, its settings, options, target)."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for more, and threads on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "qwen3", "qwen3")


def stock_logits(folder: Path) -> torch.Tensor:
    """Of stock code on every token of the vocabulary and more, float64."""
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(loading.values()), loading
    ids = torch.randint(112, (4, 48), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(ids).logits.double()
    return logits


def kl(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.log_softmax(-1), other.log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify without a process of its own, which takes its time to start."""

    def measure(folder: Path, model: ModelConfig, read: Any, dtype: Any) -> Comparison:
        save_reference(reference := folder / ".reference", model, read, dtype)
        found = compare.measure(folder, reference)
        reference.unlink()
        return Comparison(**found)

    monkeypatch.setattr(verify, "measure", measure)


def made(source: Path, to: Path, options: Options, **choices: Any) -> verb.UpcycleResult:
    return upcycle(HFFolder.open(source), source, to, options, **choices)


@pytest.mark.parametrize(("kind", "changes", "options", "family"), EXACT.values(), ids=EXACT)
def test_an_exact_recipe_keeps_the_function_in_stock_code(
    kind: str, changes: dict[str, Any], options: Options, family: str, tmp_path: Path
) -> None:
    dense = write_dense(tmp_path / "dense", kind, **changes)
    result = made(dense, tmp_path / "sparse", options)
    page = json.loads((tmp_path / "sparse/config.json").read_text())
    assert page["model_type"] == family
    assert result.exact
    before, after = stock_logits(dense), stock_logits(tmp_path / "sparse")
    assert before.std() > 0.5  # the models say something
    assert abs(kl(before, after)) < LARGEST_KL
    assert (before - after).abs().max() / before.abs().max() < 1e-5


def test_a_router_that_is_wide_awake_keeps_the_function_too(qwen3: Path, tmp_path: Path) -> None:
    made(qwen3, tmp_path / "sparse", Options(12, 4, 2, router_std=3.0))
    assert abs(kl(stock_logits(qwen3), stock_logits(tmp_path / "sparse"))) < LARGEST_KL


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        (Options(8, 2, noise=0.05), 1e-6, 0.05),
        (Options(8, 4, 2, noise=0.05), 1e-6, 0.05),
        (Options(8, 2, drop=0.5), 1e-2, 10.0),
        (Options(8, 4, 2, drop=0.5), 1e-2, 10.0),
    ],
    ids=str,
)
def test_an_inexact_recipe_says_so_and_how_far_it_is(
    options: Options, low: float, high: float, qwen3: Path, tmp_path: Path
) -> None:
    result = made(qwen3, tmp_path / "sparse", options, verify=True)
    assert not result.exact
    assert result.comparison is not None
    measured = kl(stock_logits(qwen3), stock_logits(tmp_path / "sparse"))
    assert low < measured < high
    assert low < result.comparison.kl < high
    assert result.why_not[0] in (tmp_path / "sparse/README.md").read_text()


@pytest.mark.usefixtures("in_process")
def test_bf16_is_exact_where_the_granularity_is_a_power_of_two(qwen3: Path, tmp_path: Path) -> None:
    halves = made(qwen3, tmp_path / "halves", Options(4, 2, 2), dtype="bf16", verify=True)
    assert halves.exact
    thirds = made(qwen3, tmp_path / "thirds", Options(6, 3, 3), dtype="bf16", verify=True)
    assert thirds.why_not == ("bf16 rounds down_proj times 3, which is no power of two",)
    assert halves.comparison is not None
    assert thirds.comparison is not None
    assert abs(halves.comparison.kl) < LARGEST_KL < thirds.comparison.kl < 1e-3


class Dense:
    """Random weights in memory that knows how many of its tensors are alive."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self.weights = random_weights(model)
        self.alive = self.most = 0

    def names(self) -> list[str]:
        return list(self.weights)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        piece = self.weights[name].clone()
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(piece, self._gone)
        yield piece
        del piece

    def _gone(self) -> None:
        self.alive -= 1


def dense_model(**changes: Any) -> ModelConfig:
    return CASES["qwen3"][1].model_copy(update=changes)


def weights_of(source: Upcycled) -> dict[str, torch.Tensor]:
    found = {}
    for name in source.names():
        pieces = list(source.pieces(name))
        found[name] = torch.stack(pieces) if ".experts." in name else pieces[0]
    return found


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_virtual_groups_are_the_dense_block(data: st.DataObject) -> None:
    granularity = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
    groups = data.draw(st.integers(1, 6))
    visited = data.draw(st.integers(1, groups))
    if granularity * visited == 1:
        groups = visited = 2
    shared = data.draw(st.sampled_from([None, 12, 24]))
    kind = "qwen3" if shared is None else "qwen2"
    config = CASES[kind][1].model_copy(update={"intermediate_size": 36, "num_layers": 2})
    if shared is not None:
        attention = config.attention.model_copy(update={"head_dim": 4})
        config = config.model_copy(update={"attention": attention})
    dense = Dense(config)
    options = Options(
        groups * granularity,
        visited * granularity,
        granularity,
        shared_expert_size=shared,
        seed=data.draw(st.integers(0, 99)),
    )
    sparse = Upcycled(dense, options)
    ids = torch.randint(config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    before, after = (our_logits(source.model, source.pieces, ids) for source in (dense, sparse))
    assert (before - after).abs().max() / before.abs().max() < 1e-5


def test_only_down_is_scaled_and_experts_are_the_shards_in_order() -> None:
    dense = Dense(dense_model(intermediate_size=28))
    sparse = Upcycled(dense, Options(8, 4, 4))
    found = weights_of(sparse)
    gate, up, down = (dense.weights[f"layers.1.ffn.{matrix}.weight"] for matrix in ("gate", "up", "down"))
    for expert in range(8):
        columns = slice(expert % 4 * 7, expert % 4 * 7 + 7)
        assert torch.equal(
            found["layers.1.ffn.experts.gate_up"][expert], torch.cat([gate[columns], up[columns]])
        )
        assert torch.equal(found["layers.1.ffn.experts.down"][expert], 4 * down[:, columns])
    router = found["layers.1.ffn.router.weight"]
    assert torch.equal(router[:4], router[:1].expand(4, -1))
    assert not torch.equal(router[3], router[4])
    assert not torch.equal(router, found["layers.0.ffn.router.weight"])


def test_routers_have_the_deviation_that_was_asked_for() -> None:
    dense = Dense(dense_model(hidden_size=400))
    for std, options in ((0.02, Options(64, 2)), (0.5, Options(64, 2, router_std=0.5))):
        (router,) = Upcycled(dense, options).pieces("layers.0.ffn.router.weight")
        assert float(router.std()) == pytest.approx(std, rel=0.02)


def test_drop_draws_the_same_columns_of_gate_up_and_down_anew_and_others_for_each_expert() -> None:
    dense = Dense(dense_model(hidden_size=160, intermediate_size=40))
    found = weights_of(Upcycled(dense, Options(4, 2, 2, drop=0.25)))
    gate, up, down = (dense.weights[f"layers.0.ffn.{matrix}.weight"] for matrix in ("gate", "up", "down"))
    changed = []
    for expert in range(4):
        shard = slice(expert % 2 * 20, expert % 2 * 20 + 20)
        new_gate, new_up = found["layers.0.ffn.experts.gate_up"][expert].chunk(2)
        new_down = found["layers.0.ffn.experts.down"][expert]
        sets = [
            frozenset((new_gate != gate[shard]).any(1).nonzero().flatten().tolist()),
            frozenset((new_up != up[shard]).any(1).nonzero().flatten().tolist()),
            frozenset((new_down != 2 * down[:, shard]).any(0).nonzero().flatten().tolist()),
        ]
        assert sets[0] == sets[1] == sets[2]
        assert len(sets[0]) == 5
        changed.append(sets[0])
        drawn = new_down[:, sorted(sets[0])]
        assert float(drawn.std()) == pytest.approx(float(2 * down.std()), rel=0.15)
    assert len(set(changed)) == 4


def test_noise_is_relative_to_each_matrix_and_differs_between_copies() -> None:
    dense = Dense(dense_model(hidden_size=160, intermediate_size=200))
    found = weights_of(Upcycled(dense, Options(4, 2, noise=0.1)))
    down = dense.weights["layers.0.ffn.down.weight"]
    added = found["layers.0.ffn.experts.down"] - down
    assert float(added.std()) == pytest.approx(0.1 * float(down.std()), rel=0.02)
    assert float(torch.corrcoef(added.flatten(1)).triu(1).abs().max()) < 0.05


@pytest.mark.parametrize("options", [Options(6, 4, 2), Options(6, 4, 2, noise=0.1, drop=0.5)], ids=str)
def test_the_same_seed_gives_the_same_bits_and_each_expert_stands_alone(options: Options) -> None:
    dense = Dense(dense_model())
    source = Upcycled(dense, options)
    once, again = weights_of(source), weights_of(Upcycled(dense, options))
    assert all(torch.equal(once[name], again[name]) for name in once)
    for name in ("layers.2.ffn.experts.gate_up", "layers.2.ffn.experts.down"):
        some = torch.stack(list(source.pieces(name, only=range(3, 5))))
        assert torch.equal(some, once[name][3:5])
    other = weights_of(Upcycled(dense, Options(**{**vars(options), "seed": 1})))
    assert not torch.equal(once["layers.0.ffn.router.weight"], other["layers.0.ffn.router.weight"])
    varied = not torch.equal(once["layers.0.ffn.experts.down"], other["layers.0.ffn.experts.down"])
    assert varied == bool(options.noise)


def test_at_most_two_matrices_of_the_dense_model_and_one_expert_are_alive() -> None:
    dense = Dense(dense_model())
    source = Upcycled(dense, Options(16, 4, 4, noise=0.1, drop=0.5))
    gc.disable()  # nothing may wait for the collector
    try:
        for name in source.names():
            before: weakref.ref[torch.Tensor] | None = None
            for piece in source.pieces(name):
                assert before is None or before() is None
                before = weakref.ref(piece)
                del piece
            assert dense.alive == 0
    finally:
        gc.enable()
    assert dense.most == 2


IMPOSSIBLE: dict[str, tuple[str, Options, str]] = {
    "experts": ("qwen3", Options(6, 4, 4), r"--num-experts is 6, but --granularity is 4.*multiple of 4"),
    "top_k": ("qwen3", Options(8, 2, 4), r"--top-k is 2, but --granularity is 4.*multiple of 4"),
    "width": (
        "qwen3",
        Options(6, 3, 3),
        r"--granularity is 3, but the dense block has 28.*1, 2, 4, 7, 14, 28",
    ),
    "width beside a shared expert": (
        "qwen2",
        Options(8, 4, 4, shared_expert_size=3),
        r"--granularity is 4, but the dense block has 25 .*one of 1, 5, 25",
    ),
    "more choices than experts": ("qwen3", Options(4, 8, 4), r"--top-k is 8, but --num-experts is 4"),
    "one choice": ("qwen3", Options(4, 1), r"--top-k is 1.*Use 2 or more"),
    "no experts": ("qwen3", Options(0, 2), r"must be 1 or more"),
    "too many experts": ("qwen3", Options(70_000, 2), r"num_experts"),
    "shared expert": (
        "qwen2",
        Options(4, 2, shared_expert_size=28),
        r"--shared-expert-size is 28.*Use 1 to 27",
    ),
    "dense layers": ("qwen3", Options(4, 2, first_k_dense=3), r"--first-k-dense is 3.*Use 0 to 2"),
    "noise": ("qwen3", Options(4, 2, noise=-0.1), r"--noise is -0.1"),
    "noise that is no number": ("qwen3", Options(4, 2, noise=float("nan")), r"--noise is nan"),
    "drop": ("qwen3", Options(4, 2, drop=1.5), r"--drop is 1.5"),
    "a drop of nothing": ("qwen3", Options(4, 2, drop=0.01), r"28 wide: not one column"),
    "router": ("qwen3", Options(4, 2, router_std=0.0), r"--router-std is 0.0.*above 0"),
    "another family": (
        "qwen3",
        Options(4, 2, family="mixtral"),
        r"--family is mixtral, which needs model\.attention\.qk_norm.*It can become qwen3_moe",
    ),
    "a family with a shared expert": (
        "qwen2, square, tied",
        Options(4, 2),
        r"no sparse architecture fits.*qwen2_moe \(with --shared-expert-size\)",
    ),
    "a shared expert too many": (
        "qwen3",
        Options(4, 2, shared_expert_size=4),
        r"qwen3_moe \(with no --shared-expert-size\)",
    ),
    "a dense family": ("qwen3", Options(4, 2, family="llama"), r"'llama', which is no sparse architecture"),
    "a sparse model": ("mixtral", Options(4, 2), r"has experts already"),
}


@pytest.mark.parametrize(("case", "options", "said"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_is_refused_with_a_way_out(case: str, options: Options, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        target(CASES[case][1], options)


def test_the_folder_is_a_whole_checkpoint_with_the_sources_tokenizer_and_story(
    qwen3: Path, tmp_path: Path
) -> None:
    (qwen3 / "generation_config.json").write_text('{"eos_token_id": [96, 95]}')
    (qwen3 / "chat_template.jinja").write_text("{{ messages }}")
    result = made(qwen3, tmp_path / "sparse", Options(8, 4, 2), max_shard_size=40_000)
    names = {path.name for path in (tmp_path / "sparse").iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *result.weight_files,
    }
    assert len(result.weight_files) > 1
    assert json.loads((tmp_path / "sparse/generation_config.json").read_text())["eos_token_id"] == [96, 95]
    card = (tmp_path / "sparse/README.md").read_text()
    assert "Made of the dense model `qwen3`" in card
    assert str(tmp_path) not in card
    assert "1/2 of the dense block, in virtual groups (arXiv:2410.07524)" in card


def test_an_existing_folder_is_left_alone(qwen3: Path, tmp_path: Path) -> None:
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse/mine").write_text("x")
    with pytest.raises(ExportError, match="never overwrites"):
        made(qwen3, tmp_path / "sparse", Options(4, 2))
    assert [path.name for path in (tmp_path / "sparse").iterdir()] == ["mine"]


@pytest.mark.usefixtures("in_process")
def test_verify_refuses_an_exact_recipe_that_is_not(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Upcycled._down
    monkeypatch.setattr(Upcycled, "_down", lambda *a: (1.01 * piece for piece in right(*a)))
    with pytest.raises(ExportError, match=r"should keep the dense model's function.*nothing was written"):
        made(qwen3, tmp_path / "sparse", Options(4, 2), verify=True)
    assert not (tmp_path / "sparse").exists()


def test_the_verb_says_what_it_did_and_whether_that_is_exact(qwen3: Path, tmp_path: Path) -> None:
    line = [str(qwen3), "--num-experts", "8", "--top-k", "4", "--granularity", "2"]
    runner = CliRunner()
    done = runner.invoke(
        verb.command, [*line, "--to", str(tmp_path / "a"), "--verify", "--json", str(tmp_path / "a.json")]
    )
    assert done.exit_code == 0, done.output
    assert "into Qwen3MoeForCausalLM with 8 experts of width 18, 4 a token" in done.output
    assert "exact: but for rounding it is the dense model's function" in done.output
    assert "verified: transformers" in done.output
    page = json.loads((tmp_path / "a.json").read_text())
    assert page["exact"]
    assert abs(page["comparison"]["kl"]) < LARGEST_KL
    done = runner.invoke(verb.command, [*line, "--to", str(tmp_path / "b"), "--drop", "0.5"])
    assert done.exit_code == 0, done.output
    assert "not exact: 50% of every expert's inner columns are drawn anew" in done.output
    done = runner.invoke(verb.command, [*line, "--to", str(tmp_path / "c"), "--family", "mixtral"])
    assert done.exit_code == 2
    assert "It can become qwen3_moe" in done.output
    assert not (tmp_path / "c").exists()


def test_the_study_trains_both_sparse_models_alike_but_for_where_they_begin(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "configs/study/upcycle.yaml"
    plan = Plan(recipe, ("train.micro_batch_size=2",), tmp_path, Options(8, 4, 2), 200, 1)
    scratch = plan.sparse("scratch", None)
    run = load(RunConfig, recipe, scratch)
    assert run.model.moe is not None
    assert (run.model.moe.num_experts, run.model.moe.top_k, run.train.steps) == (8, 4, 200)
    assert run.model.moe.expert_intermediate_size * 2 == plan.dense().model.intermediate_size
    upcycled = plan.sparse("upcycled", tmp_path / "from")
    places = {"name=upcycled", f"run_dir={tmp_path / 'upcycled'}", f"init_from={tmp_path / 'from'}"}
    assert set(upcycled) - set(scratch) == places


def test_the_source_of_a_test_is_what_an_export_reads() -> None:
    config = CASES["qwen3"][1]
    saved = Saved(run_of(config), random_weights(config))
    assert Dense(config).names() == saved.names()
