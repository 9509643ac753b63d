"""Every rule of moe/config, broken once: one clear message with the value, the rule and the way out."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import ValidationError

from moe import recipe
from moe.config import RunConfig, cautions, check_data, check_world
from moe.errors import ConfigError

Page = dict[str, Any]


def parse(page: Page, *overrides: str) -> RunConfig:
    return recipe.parse(RunConfig, recipe.yaml.safe_dump(page), overrides, source="recipe.yaml")


# What is set, and what the message must say: the value, the rule, the way out.
BROKEN: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["train.step=10"], ["train.step: there is no such setting", "did you mean train.steps?"]),
    "unknown key deep down": (
        ["train.optimizer.lr=0.1"],
        ["train.optimizer.lr: there is no", "learning_rate"],
    ),
    "unknown section": (["modle.num_layers=2"], ["modle: there is no such setting", "did you mean model?"]),
    "word for a number": (
        ["train.steps=many"],
        ["train.steps is 'many'", "valid integer", "train.steps=VALUE"],
    ),
    "fraction for a count": (["train.steps=1.5"], ["train.steps is 1.5", "integer", "train.steps=VALUE"]),
    "number for a word": (["name=7"], ["name is 7", "valid string", "name=VALUE"]),
    "word for a switch": (["data.verify_hashes=maybe"], ["data.verify_hashes is 'maybe'", "valid boolean"]),
    "number for a block": (["train=7"], ["train is 7", "block of settings", "steps"]),
    "number for an optional block": (["model.moe=7"], ["model.moe is 7", "block of settings", "top_k"]),
    "missing": (["model.vocab_size=null"], ["model.vocab_size is None", "valid integer", "VALUE"]),
    "negative": (["train.steps=-1"], ["train.steps is -1", "greater than 0", "train.steps=VALUE"]),
    "zero experts": (["model.moe.num_experts=0"], ["model.moe.num_experts is 0", "greater than 0"]),
    "beta of one": (["train.optimizer.beta2=1.0"], ["train.optimizer.beta2 is 1.0", "less than 1"]),
    "muon's momentum for adamw": (
        ["train.optimizer.momentum=0.9"],
        ["train.optimizer.momentum is 0.9", "kind is adamw", "no effect", "use kind muon"],
    ),
    "unknown optimizer": (["train.optimizer.kind=sgd"], ["kind is 'sgd'", "'adamw' or 'muon'"]),
    "fraction above one": (
        ["train.schedule.final_fraction=2"],
        ["final_fraction is 2", "less than or equal to 1"],
    ),
    "not a number": (["train.optimizer.learning_rate=.nan"], ["learning_rate is nan", "finite"]),
    "unknown choice": (["train.precision=fp8"], ["train.precision is 'fp8'", "'fp32' or 'bf16'"]),
    "stage four": (["parallel.zero_stage=4"], ["parallel.zero_stage is 4", "0, 1, 2 or 3"]),
    "offload to a disk": (
        ["parallel.offload=nvme"],
        ["parallel.offload is 'nvme'", "'none', 'optimizer' or 'all'"],
    ),
    "path for a name": (["name=../up"], ["name is '../up'", "letters, digits, dot, dash", "name=VALUE"]),
    "heads and width": (
        ["model.attention.num_heads=6", "model.attention.num_kv_heads=3"],
        ["model.hidden_size is 32", "num_heads is 6", "Use one of 1, 2, 4, 8, 16, 32 heads"],
    ),
    "key heads": (
        ["model.attention.num_kv_heads=3"],
        ["num_kv_heads is 3", "num_heads is 4", "Use one of 1, 2, 4"],
    ),
    "odd head": (["model.attention.head_dim=7"], ["head_dim is 7", "must be even", "Use 8"]),
    "dense without a width": (
        ["model.moe.first_k_dense=1"],
        ["model.intermediate_size is not set", "1 of 2 layers are dense", "Set model.intermediate_size"],
    ),
    "width without a dense layer": (
        ["model.intermediate_size=64"],
        ["model.intermediate_size is 64", "every layer is sparse", "Remove it"],
    ),
    "more choices than experts": (["model.moe.top_k=9"], ["top_k is 9", "num_experts is 8", "1 to 8"]),
    "router without a gradient": (
        ["model.moe.top_k=1"],
        ["normalize_top_k is true", "normalize_top_k=false"],
    ),
    "no sparse layer": (
        ["model.moe.first_k_dense=2", "model.intermediate_size=64"],
        ["first_k_dense is 2", "num_layers is 2", "Use 1 or less"],
    ),
    "gate without a shared expert": (
        ["model.moe.shared_expert_gate=true"],
        ["shared_expert_gate is true", "no effect", "shared_expert_intermediate_size"],
    ),
    "long sequences": (
        ["data.sequence_length=65"],
        ["sequence_length is 65", "length is 64", "Use 64 or less"],
    ),
    "long warm-up": (["train.schedule.warmup_steps=9"], ["warmup_steps is 9", "steps is 8", "Use 8 or less"]),
    "wsd without a decay": (["train.schedule.kind=wsd"], ["decay_steps is None", "kind wsd", "Set both"]),
    "decay without wsd": (
        ["train.schedule.decay_steps=2"],
        ["decay_steps is 2", "kind cosine", "or neither"],
    ),
    "decay of a constant": (
        ["train.schedule.kind=constant", "train.schedule.final_fraction=0.5"],
        ["final_fraction is set", "never decays", "Remove it"],
    ),
    "milestones where all are kept": (
        ["checkpoint.keep_every=4", "checkpoint.every_steps=2"],
        ["keep_every is 4", "keep is null", "no effect", "Set checkpoint.keep"],
    ),
    "milestones that are not saved": (
        ["checkpoint.keep_every=3", "checkpoint.every_steps=2", "checkpoint.keep=1"],
        ["keep_every is 3", "every_steps is 2", "Use a multiple"],
    ),
    "overlapping schedule": (
        ["train.schedule.kind=wsd", "train.schedule.decay_steps=6", "train.schedule.warmup_steps=4"],
        ["warmup_steps 4 + decay_steps 6", "train.steps 8", "Shorten"],
    ),
    "uneven batch": (
        ["train.micro_batch_size=3"],
        ["global_batch_size is 8", "is 3", "Use one of 1, 2, 4, 8"],
    ),
    "uneven experts": (
        ["parallel.expert_parallel_size=3"],
        ["expert_parallel_size is 3", "num_experts is 8", "Use one of 1, 2, 4, 8"],
    ),
    "expert parallel without experts": (
        ["model.moe=null", "model.intermediate_size=64", "parallel.expert_parallel_size=2"],
        ["expert_parallel_size is 2", "no experts", "Use 1, or add model.moe"],
    ),
    "DeepEP without a journey": (
        ["parallel.dispatch=deepep", "train.precision=bf16"],
        ["dispatch is deepep", "expert_parallel_size is 1", "no effect", "Remove it"],
    ),
    "DeepEP in float32": (
        ["parallel.dispatch=deepep", "parallel.expert_parallel_size=2", "train.precision=fp32"],
        ["dispatch is deepep", "precision is fp32", "Use train.precision=bf16"],
    ),
    "experts recomputed in a dense model": (
        ["model.moe=null", "model.intermediate_size=64", "train.activation_recomputation=experts"],
        ["activation_recomputation is experts", "dense", "no effect"],
    ),
    "latent as wide as the model": (
        ["model.moe.latent_size=64"],
        ["latent_size is 64", "hidden_size is", "Use less than"],
    ),
    "bf16 under stage 0": (
        ["parallel.zero_stage=0", "train.precision=bf16"],
        ["zero_stage is 0", "bf16", "Use zero_stage 1, or fp32"],
    ),
    "muon under stage 3": (
        ["parallel.zero_stage=3", "train.optimizer.kind=muon"],
        ["zero_stage is 3", "muon", "needs whole ones", "Use zero_stage 2, or kind adamw"],
    ),
    "offload of nothing": (
        ["parallel.zero_stage=0", "train.precision=fp32", "parallel.offload=optimizer"],
        ["offload is optimizer", "zero_stage is 0", "Use zero_stage 1"],
    ),
    "parameters offloaded under stage 2": (
        ["parallel.zero_stage=2", "parallel.offload=all"],
        ["offload is all", "zero_stage is 2", "Use zero_stage 3, or offload optimizer"],
    ),
    "muon on the host": (
        ["parallel.offload=optimizer", "train.optimizer.kind=muon"],
        ["offload is optimizer", "muon", "Use kind adamw, or offload none"],
    ),
    "balance without experts": (
        ["model.moe=null", "model.intermediate_size=64", "balance.router_z_loss_weight=0.1"],
        ["balance is set", "no experts", "Remove the balance section"],
    ),
    "bias without a place": (
        ["balance.bias_update_rate=0.001"],
        ["bias_update_rate is 0.001", "selection_bias is false", "Set model.moe.selection_bias=true"],
    ),
    "half a group rule": (
        ["model.moe.num_expert_groups=4"],
        ["num_expert_groups is 4", "top_k_groups is None", "Set both, or neither"],
    ),
    "uneven groups": (
        ["model.moe.num_expert_groups=3", "model.moe.top_k_groups=1"],
        ["num_expert_groups is 3", "num_experts is 8", "Use one of 1, 2, 4, 8"],
    ),
    "too few groups": (
        ["model.moe.num_expert_groups=8", "model.moe.top_k_groups=1", "model.moe.group_score=max"],
        ["top_k_groups is 1", "top_k of 2", "Use 2 to 8"],
    ),
    "two of one": (
        ["model.moe.num_expert_groups=8", "model.moe.top_k_groups=2"],
        ["group_score is top2_sum", "1 expert", "Use group_score max"],
    ),
    "score of no group": (
        ["model.moe.group_score=max"],
        ["group_score is max", "no groups", "Remove it"],
    ),
    "groups where experts choose": (
        ["model.moe.router_choice=expert", "model.moe.num_expert_groups=4", "model.moe.top_k_groups=2"],
        ["num_expert_groups is 4", "router_choice is expert", "no effect", "Remove num_expert_groups"],
    ),
    "groups in turn": (
        ["model.moe.router_choice=round_robin", "model.moe.num_expert_groups=4", "model.moe.top_k_groups=2"],
        ["num_expert_groups is 4", "router_choice is round_robin", "or use router_choice token"],
    ),
    "bias where experts choose": (
        [
            "model.moe.router_choice=expert",
            "model.moe.selection_bias=true",
            "balance.bias_update_rate=0.001",
        ],
        ["selection_bias is true", "router_choice is expert", "no effect", "balance.bias_update_rate=0"],
    ),
    "a weight that is always 1": (
        ["model.moe.router_choice=expert"],
        [
            "normalize_top_k is true",
            "router_choice is expert",
            "always weigh 1",
            "Set model.moe.normalize_top_k=false",
        ],
    ),
    "balance where loads are equal": (
        ["model.moe.router_choice=round_robin"],
        ["sequence_loss_weight is 0.01", "equal loads", "Set balance.sequence_loss_weight=0"],
    ),
    "global balance where loads are equal": (
        ["model.moe.router_choice=expert", "balance.global_batch_loss_weight=0.3"],
        ["balance.global_batch_loss_weight is 0.3", "equal loads"],
    ),
    "micro-batch balance where loads are equal": (
        ["model.moe.router_choice=expert", "balance.micro_batch_loss_weight=0.3"],
        ["balance.micro_batch_loss_weight is 0.3", "equal loads"],
    ),
    "capacity where loads are equal": (
        ["model.moe.router_choice=expert", "balance.capacity_factor=1.25"],
        ["balance.capacity_factor is 1.25", "equal loads", "Set balance.capacity_factor=null"],
    ),
    "fewer heads than ranks that share a sequence": (
        ["parallel.sequence_parallel_size=8", "model.attention.num_kv_heads=4"],
        ["sequence_parallel_size is 8", "num_heads is 4", "as many heads", "Use one of 1, 2, 4."],
    ),
    "fewer key heads than ranks that share a sequence": (
        ["parallel.sequence_parallel_size=4"],
        ["sequence_parallel_size is 4", "num_kv_heads is 2", "Use one of 1, 2, or a num_kv_heads", "of 4."],
    ),
    "sequences that cannot be shared": (
        ["parallel.sequence_parallel_size=2", "data.sequence_length=31"],
        ["sequence_parallel_size is 2", "sequence_length is 31", "Use 1, or a data.sequence_length", "of 2."],
    ),
    "capacity of a part": (
        ["parallel.sequence_parallel_size=2", "balance.capacity_factor=1.25"],
        ["capacity_factor is 1.25", "sequence_parallel_size is 2", "Set balance.capacity_factor=null, or"],
    ),
    "a part that experts choose from": (
        [
            "parallel.sequence_parallel_size=2",
            "model.moe.router_choice=expert",
            "model.moe.normalize_top_k=false",
            "balance.sequence_loss_weight=0",
        ],
        ["router_choice is expert", "sequence_parallel_size is 2", "Use router_choice token, or"],
    ),
    "drop of nothing": (
        ["balance.drop_by=position"],
        ["drop_by is position", "nothing is dropped", "capacity_factor"],
    ),
    "a steepness that SwiGLU has not": (
        ["model.moe.activation_alpha=1.5"],
        ["activation_alpha is 1.5", "expert_activation is swiglu", "no effect", "Remove it, or use"],
    ),
    "a margin without its score": (
        ["model.moe.sparsemixer_margin=0.2"],
        ["router_score is softmax", "sparsemixer_margin is 0.2", "belong together", "Set both, or remove"],
    ),
    "sparsemixer steered otherwise": (
        [
            "model.moe.router_score=sparsemixer",
            "model.moe.sparsemixer_margin=0.2",
            "model.moe.selection_bias=true",
            "balance.bias_update_rate=0.01",
        ],
        ["router_score is sparsemixer", "selection_bias is True", "Use router_choice token"],
    ),
    "capacity that nothing can fill": (
        ["balance.capacity_factor=4"],
        ["capacity_factor is 4", "top_k 2 of 8", "more than 4 times the mean", "Use a smaller factor, or"],
    ),
    "noise beyond the signal": (["balance.router_jitter=1.0"], ["router_jitter is 1.0", "less than 1"]),
    "bias that nothing moves": (
        ["model.moe.selection_bias=true"],
        ["selection_bias is true", "bias_update_rate is 0", "no effect", "Set balance.bias_update_rate"],
    ),
    "rule of a bias that rests": (
        ["balance.bias_update=proportional"],
        ["bias_update is proportional", "no effect", "give the bias a rate"],
    ),
    "a limit of what never happens": (
        ["train.guard.max_in_a_row=3"],
        ["train.guard.max_in_a_row is 3", "no step is ever skipped", "no effect", "non_finite=skip"],
    ),
    "rolled back for nothing": (
        ["train.guard.then=roll_back", "checkpoint.every_steps=2"],
        ["train.guard.then is roll_back", "no step is ever skipped", "no effect"],
    ),
    "an interval without spikes": (
        ["train.guard.rolling_interval_length=4"],
        ["rolling_interval_length is 4", "sigma_factor is null", "no effect", "Remove it"],
    ),
    "spikes beyond the end": (
        ["train.guard.sigma_factor=6"],
        [
            "sigma_factor is 6.0",
            "after 64 steps",
            "train.steps is 8",
            "Use a smaller rolling_interval_length",
        ],
    ),
    "roll-backs of a run that stops": (
        ["train.guard.non_finite=skip", "train.guard.max_roll_backs=1"],
        ["max_roll_backs is 1", "then is stop", "no effect", "then=roll_back"],
    ),
    "nothing to roll back to": (
        ["train.guard.non_finite=skip", "train.guard.then=roll_back"],
        ["then is roll_back", "checkpoint.every_steps is null", "Set checkpoint.every_steps"],
    ),
    "skipped where gradients stay": (
        ["train.guard.non_finite=skip", "parallel.offload=optimizer"],
        ["lets steps be skipped", "parallel.offload is optimizer", "Use parallel.offload=none"],
    ),
    "an interval of one": (
        ["train.guard.sigma_factor=6", "train.guard.rolling_interval_length=1"],
        ["rolling_interval_length is 1", "greater than or equal to 2"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_recipe_is_refused_with_value_rule_and_way_out(case: str, tiny_page: Page) -> None:
    overrides, said = BROKEN[case]
    with pytest.raises(ConfigError) as refused:
        parse(tiny_page, *overrides)
    message = str(refused.value)
    assert message.startswith("recipe.yaml: ")
    assert [part for part in said if part not in message] == [], message


def test_the_tiny_recipe_itself_is_sound(tiny_page: Page) -> None:
    assert parse(tiny_page).model.sparse_layers == (0, 1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.moe.router_choice=expert", "model.moe.normalize_top_k=false"], "leaks the future"),
        (["model.moe.router_choice=round_robin"], "learns no routing"),
    ],
)
def test_a_choice_that_trains_no_language_model_comes_with_a_caution(
    overrides: list[str], said: str, tiny_page: Page
) -> None:
    (caution,) = cautions(parse(tiny_page, *overrides, "balance.sequence_loss_weight=0").model)
    assert said in caution
    assert cautions(parse(tiny_page).model) == []


def test_every_fault_is_named_at_once(tiny_page: Page) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(tiny_page, "train.steps=0", "sead=1", "model.moe.top_k=two")
    assert all(
        part in str(refused.value) for part in ("train.steps is 0", "did you mean seed", "top_k is 'two'")
    )


def test_every_contradiction_is_named_at_once(tiny_page: Page) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(tiny_page, "model.moe.top_k=9", "train.micro_batch_size=3")
    assert all(part in str(refused.value) for part in ("top_k is 9", "micro_batch_size is 3"))


def test_a_required_setting_that_is_left_out_is_named_with_its_meaning(tiny_page: Page) -> None:
    del tiny_page["data"]["path"]
    with pytest.raises(
        ConfigError, match=r"data\.path is required.*Folder made by `turnout prepare`.*data\.path=VALUE"
    ):
        parse(tiny_page)


def test_settings_do_not_change_after_they_were_checked(tiny_page: Page) -> None:
    run = parse(tiny_page)
    with pytest.raises(ValidationError):
        run.seed = 8  # type: ignore[misc]  # that it is refused is the point


@pytest.mark.parametrize(
    ("overrides", "world_size", "said"),
    [
        (
            ["parallel.expert_parallel_size=2"],
            3,
            ["expert_parallel_size is 2", "are 3 ranks", "Use 1, or start a multiple of 2 ranks"],
        ),
        (
            ["parallel.expert_parallel_size=4"],
            6,
            ["expert_parallel_size is 4", "6 ranks", "Use one of 1, 2,"],
        ),
        (["parallel.expert_parallel_size=2"], 1, ["there is 1 rank:", "Use 1, or"]),
        ([], 3, ["3 ranks x train.micro_batch_size 2 = 6", "another number of ranks (one of 1, 2, 4)."]),
        (["train.micro_batch_size=8"], 2, ["= 16 sequences", "micro_batch_size of one of 1, 2, 4."]),
        (["train.micro_batch_size=8"], 8, ["= 64 sequences", "micro_batch_size of 1."]),
        (["parallel.expert_parallel_size=4"], 2, ["expert_parallel_size is 4", "2 ranks", "Use one of 1, 2"]),
        ([], 8, ["global_batch_size is 8", "8 ranks x train.micro_batch_size 2 = 16", "multiple of 16"]),
        (
            ["parallel.sequence_parallel_size=2"],
            3,
            ["sequence_parallel_size is 2", "are 3 ranks", "Use 1, or start a multiple of 2 ranks"],
        ),
        (
            ["parallel.sequence_parallel_size=4", "model.attention.num_kv_heads=4"],
            6,
            ["sequence_parallel_size is 4", "are 6 ranks", "Use one of 1, 2, or start a multiple of 4 ranks"],
        ),
        (
            ["parallel.sequence_parallel_size=2"],
            6,
            [
                "6 ranks / parallel.sequence_parallel_size 2 x train.micro_batch_size 2 = 6",
                "(one of 2, 4, 8).",
            ],
        ),
        (
            ["parallel.sequence_parallel_size=2", "parallel.expert_parallel_size=4"],
            12,
            ["= 12 sequences", "another number of ranks (one of 4, 8)."],
        ),
    ],
)
def test_a_layout_that_cannot_be_is_refused(
    overrides: list[str], world_size: int, said: list[str], tiny_page: Page
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_world(parse(tiny_page, *overrides), world_size)
    assert [part for part in said if part not in str(refused.value)] == [], refused.value


@pytest.mark.parametrize(("world_size", "steps"), [(1, 4), (2, 2), (4, 1)])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(
    world_size: int, steps: int, tiny_page: Page
) -> None:
    assert check_world(parse(tiny_page), world_size) == steps


@pytest.mark.parametrize(("sharing", "world_size", "steps"), [(2, 2, 4), (2, 4, 2), (4, 4, 4), (4, 16, 1)])
def test_ranks_that_share_sequences_have_a_micro_batch_together(
    sharing: int, world_size: int, steps: int, tiny_page: Page
) -> None:
    run = parse(tiny_page, f"parallel.sequence_parallel_size={sharing}", "model.attention.num_kv_heads=4")
    assert check_world(run, world_size) == steps


@dataclass(frozen=True)
class Facts:
    vocab_size: int = 512
    tokens: dict[str, int] = field(default_factory=lambda: {"train": 10_000, "validation": 1_000})

    longest: int | None = None

    def num_tokens(self, split: str) -> int:
        return self.tokens[split]

    def longest_conversation(self) -> int | None:
        return self.longest


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            Facts(vocab_size=513),
            ["vocab_size is 512", "data/tiny has 513", "Set model.vocab_size=513 or more"],
        ),
        (
            Facts(tokens={"train": 20, "validation": 5}),
            ["sequence_length is 32", "20 tokens", "length=19 or less"],
        ),
        (
            Facts(tokens={"train": 999, "validation": 0}),
            ["evaluate_every is 4", "no validation split", "Prepare it"],
        ),
        (
            Facts(longest=40),
            ["sequence_length is 32", "longest conversation", "40 tokens", "length=39 or more", "max_tokens"],
        ),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(
    facts: Facts, said: list[str], tiny_page: Page
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_data(parse(tiny_page, "train.evaluate_every=4"), facts)
    assert [part for part in said if part not in str(refused.value)] == [], refused.value


def test_data_that_fits_is_accepted(tiny_page: Page) -> None:
    check_data(parse(tiny_page, "train.evaluate_every=4"), Facts())
    few = Facts(tokens={"train": 20, "validation": 5}, longest=20)
    check_data(parse(tiny_page, "train.evaluate_every=4"), few)


def test_every_setting_says_what_it_means() -> None:
    schema = RunConfig.model_json_schema()
    sections = {"RunConfig": schema, **schema["$defs"]}
    silent = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, setting in section["properties"].items()
        if "description" not in setting and "$ref" not in str(setting)
    ]
    assert silent == []
