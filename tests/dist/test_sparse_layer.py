"""The sparse layer on 1, 2 and 4 ranks against the float64 reference: forward and every gradient."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.config import BalanceConfig, MoEConfig
from moe.loss import Totals, losses
from moe.model import ModelOutput
from moe.sparse import Capacity, ExpertLayout, Jitter, SparseMoE
from moe.sparse.product import Products
from moe.sparse.reference import ReferenceWeights, sparse_layer
from tests.harness import run_ranks
from tests.names import REFERENCE
from tests.onednn import needs_onednn

SCOPES = {"sequence": 0.7, "micro_batch": 0.45, "global_batch": 0.3}
"""Weights of the balancing losses: no two alike, so that none can stand for another in their sum."""


@dataclass(frozen=True)
class Case:
    """One layer and one batch; sizes are odd so that nothing divides by luck."""

    name: str
    tokens: int = 36  # over all ranks
    hidden: int = 7
    inner: int = 5
    experts: int = 8
    top_k: int = 3
    normalize: bool = True
    shared: int | None = None
    shared_gate: bool = False
    masked: str = "none"  # none | some | sequence (one of each rank) | rank (all of rank 0's tokens) | all
    routing: str = (
        "free"  # free | one (expert 2 is everybody's first choice) | starved (experts 4.. get none)
    )
    score: str = "softmax"
    margin: float | None = None  # sparsemixer's
    router_bias: bool = False
    scale: float = 1.0
    groups: tuple[int, int, str] | None = None  # groups, of which a token may visit, score of a group
    bias: bool = False
    capacity: Capacity | None = None
    scopes: tuple[str, ...] = ("sequence", "micro_batch", "global_batch")
    jitter: float = 0.0
    choice: str = "token"
    activation: str = "swiglu"
    alpha: float | None = None  # gpt_oss's, if not its own
    limit: float | None = None
    expert_bias: bool = False
    latent: int | None = None
    recompute: bool = False
    seed: int = 5

    @property
    def config(self) -> MoEConfig:
        groups: dict[str, Any] = {}
        if self.groups is not None:
            groups = dict(zip(("num_expert_groups", "top_k_groups", "group_score"), self.groups, strict=True))
        alpha = {} if self.alpha is None else {"activation_alpha": self.alpha}
        return MoEConfig(
            num_experts=self.experts,
            top_k=self.top_k,
            expert_intermediate_size=self.inner,
            router_score=self.score,
            sparsemixer_margin=self.margin,
            router_bias=self.router_bias,
            router_choice=self.choice,
            normalize_top_k=self.normalize,
            route_scale=self.scale,
            selection_bias=self.bias,
            shared_expert_intermediate_size=self.shared,
            shared_expert_gate=self.shared_gate,
            expert_activation=self.activation,
            activation_limit=self.limit,
            expert_bias=self.expert_bias,
            latent_size=self.latent,
            **alpha,
            **groups,
        )

    @property
    def balance(self) -> BalanceConfig:
        """Losses of balance make no sense where experts choose."""
        scopes = () if self.choice == "expert" else self.scopes
        weights = {f"{scope}_loss_weight": SCOPES[scope] if scope in scopes else 0.0 for scope in SCOPES}
        return BalanceConfig(router_z_loss_weight=0.2, **weights)

    def sequences(self, world_size: int) -> int:
        """On each rank: several, where its tokens allow."""
        return next(number for number in (3, 2, 1) if self.tokens // world_size % number == 0)


CASES = [
    Case("plain"),
    Case("raw weights", normalize=False),
    *(Case(f"{scope} loss alone", scopes=(scope,), masked="some") for scope in SCOPES),
    Case("no balancing loss", scopes=()),
    Case("a sequence masked throughout", masked="sequence"),
    Case("top-1", top_k=1, normalize=False),
    Case("all experts", top_k=8),
    Case("shared", shared=6),
    Case("gated shared, square", hidden=8, inner=8, shared=8, shared_gate=True),
    Case("one expert takes all", routing="one", top_k=1, normalize=False),
    Case("half the experts starve", routing="starved"),
    Case("masked tokens", masked="some", shared=6),
    Case("one rank all masked", masked="rank"),
    Case("all masked", masked="all"),
    Case("one token a rank", tokens=4),
    Case("DeepSeek-V2", groups=(4, 2, "max"), normalize=False, scale=4.0, shared=6),
    Case("DeepSeek-V3", score="sigmoid", groups=(4, 2, "top2_sum"), bias=True, scale=2.5, shared=6),
    Case("DeepSeek-V3, masked, starved", score="sigmoid", bias=True, masked="some", routing="starved"),
    Case("capped SwiGLU, recomputed", limit=0.7, recompute=True),
    Case("GPT-OSS", activation="gpt_oss", limit=0.7, expert_bias=True, masked="some"),
    Case(
        "GPT-OSS, starved, recomputed",
        activation="gpt_oss",
        expert_bias=True,
        routing="starved",
        recompute=True,
    ),
    Case("a steeper gate and the router's bias", activation="gpt_oss", alpha=2.6, router_bias=True),
    Case("router's bias, sigmoid", score="sigmoid", router_bias=True, bias=True, masked="some"),
    Case("sparsemixer", score="sparsemixer", margin=0.2, router_bias=True, scale=1.7),
    Case("latent", latent=4, shared=6),
    Case("latent, dropped", latent=4, expert_bias=True, capacity=Capacity(0.6, "score"), masked="some"),
    Case("drop by score", capacity=Capacity(0.8, "score")),
    Case("drop by position", capacity=Capacity(0.8, "position"), score="sigmoid", bias=True),
    Case("drop nearly all", capacity=Capacity(0.05, "score"), routing="one"),
    Case("drop with masked tokens", capacity=Capacity(0.7, "position"), masked="some", shared=6),
    Case("drop with one rank all masked", capacity=Capacity(1.0, "score"), masked="rank"),
    Case("drop with all masked", capacity=Capacity(1.0, "score"), masked="all"),
    Case("experts choose", choice="expert", normalize=False),
    Case("experts choose, an odd number of tokens", tokens=28, choice="expert", normalize=False, scale=1.7),
    Case("experts choose with jitter", choice="expert", normalize=False, jitter=0.5, score="sigmoid"),
    Case("experts choose among few", choice="expert", normalize=False, tokens=4, shared=6),
    Case("experts choose, one rank all masked", choice="expert", normalize=False, masked="rank"),
    Case("experts choose, all masked", choice="expert", normalize=False, masked="all", shared=6),
    Case("in turn", choice="round_robin", masked="some", shared=6),
    Case("in turn, one rank all masked", choice="round_robin", normalize=False, masked="rank"),
    Case("jitter", jitter=0.3, shared=6),
    Case("jitter, masked, sigmoid", jitter=0.9, masked="some", score="sigmoid", bias=True),
]

SCORES_AND_WEIGHTS = (("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False))
SHARED = ((None, False), (6, False), (6, True))
SWITCHES = itertools.product(
    SCORES_AND_WEIGHTS,
    (None, (4, 2, "top2_sum"), (2, 1, "max")),
    (False, True),  # selection bias
    (None, Capacity(0.9, "score"), Capacity(0.9, "position")),
    SHARED,
)
COMBINATIONS = [
    Case(
        f"{score} {normalize} {groups} {bias} {capacity} {shared}",
        tokens=16,
        score=score,
        normalize=normalize,
        groups=groups,
        bias=bias,
        capacity=capacity,
        shared=shared[0],
        shared_gate=shared[1],
        scale=1.7,
        masked="some" if number % 2 else "none",
    )
    for number, ((score, normalize), groups, bias, capacity, shared) in enumerate(SWITCHES)
] + [
    Case(
        f"{choice} {score} {normalize} {shared} {masked}",
        tokens=16,
        choice=choice,
        score=score,
        normalize=normalize,
        shared=shared[0],
        shared_gate=shared[1],
        scale=1.7,
        masked=masked,
    )
    for choice, (score, normalize), shared, masked in itertools.product(
        ("expert", "round_robin"), SCORES_AND_WEIGHTS, SHARED, ("none", "some")
    )
    if not (choice == "expert" and normalize)
]


def _weights(case: Case) -> ReferenceWeights:
    draw = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    d, f, e, s = case.hidden, case.inner, case.experts, case.shared
    width = case.latent or d
    router = normal(e, d)
    if case.routing != "free":
        favoured = slice(2, 3) if case.routing == "one" else slice(0, 4)
        router = router * 0.1
        # x[:, 0] is positive: see _batch. Not so much that scores saturate at 1 and tie.
        router[favoured, 0] += 6.0
    return ReferenceWeights(
        router_ED=router,
        gate_up_E2FD=normal(e, 2 * f, width),
        down_EDF=normal(e, width, f),
        gate_up_bias_E2F=normal(e, 2 * f) if case.expert_bias else None,
        down_bias_ED=normal(e, width) if case.expert_bias else None,
        to_latent_LD=normal(width, d) if case.latent else None,
        from_latent_DL=normal(d, width) if case.latent else None,
        shared_gate_FD=normal(s, d) if s else None,
        shared_up_FD=normal(s, d) if s else None,
        shared_down_DF=normal(d, s) if s else None,
        shared_expert_gate_1D=normal(1, d) if case.shared_gate else None,
        router_bias_E=normal(e) if case.router_bias else None,
    )


def _batch(case: Case, world_size: int) -> tuple[Tensor, Tensor | None, Tensor]:
    draw = torch.Generator().manual_seed(case.seed + 1)
    x = torch.randn(case.tokens, case.hidden, generator=draw, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs() + 0.5
    grad = torch.randn(x.shape, generator=draw, dtype=torch.float64)
    mask = torch.ones(case.tokens, dtype=torch.bool)
    match case.masked:
        case "none":
            return x, None, grad
        case "some":
            mask[::3] = False
        case "sequence":  # the first of each rank
            here = case.tokens // world_size
            mask.view(world_size, here)[:, : here // case.sequences(world_size)] = False
        case "rank":
            mask[: case.tokens // world_size] = world_size == 1
        case "all":
            mask[:] = False
    return x, mask, grad


TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}


def _compare(name: str, ours: Tensor | None, reference: Tensor | None) -> None:
    assert ours is not None, name
    reference = torch.zeros_like(ours) if reference is None else reference.to(ours.dtype)
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


def _check(
    rank: int, world_size: int, ep: int, cases: list[Case], dtype: torch.dtype = torch.float64
) -> None:
    group = None
    for first in range(0, world_size, ep):
        members = list(range(first, first + ep))
        made = dist.new_group(members) if world_size > 1 else None
        group = made if rank in members else group
    for case in cases:
        try:
            check_case(case, rank, world_size, ExpertLayout(case.experts, ep, rank % ep, group), dtype)
        except Exception as error:
            raise AssertionError(f"case {case.name!r}, world {world_size}, EP {ep}") from error


def check_case(
    case: Case, rank: int, world_size: int, layout: ExpertLayout, dtype: torch.dtype = torch.float64
) -> None:
    """`dtype` is the layer's; the reference computes in float64 what that holds."""
    drawn, (x, mask, grad) = _weights(case), _batch(case, world_size)
    x, grad = x.to(dtype).double(), grad.to(dtype).double()
    leaves = {k: v.to(dtype).double().requires_grad_() for k, v in vars(drawn).items() if v is not None}
    weights = replace(drawn, **leaves)
    x_ref = x.clone().requires_grad_()
    bias = torch.linspace(-0.3, 0.3, case.experts) if case.bias else None

    def noise(places: range) -> Jitter:
        return Jitter.of(case.jitter, 77, places)

    expected = sparse_layer(
        x_ref,
        weights,
        case.config,
        mask_T=mask,
        selection_bias_E=bias,
        jitter_TD=noise(range(case.tokens)).factors(case.hidden, torch.float64),
        capacity=case.capacity,
        micro_batches=world_size,
        sequences=world_size * case.sequences(world_size),
    )
    aux = case.balance.global_batch_loss_weight * expected.load_balancing_loss
    aux = aux + case.balance.sequence_loss_weight * expected.sequence_loss
    aux = aux + case.balance.micro_batch_loss_weight * expected.micro_batch_loss
    aux = aux + case.balance.router_z_loss_weight * expected.z_loss
    ((expected.y_TD * grad).sum() + aux).backward()

    layer = SparseMoE(case.hidden, case.config, layout, case.capacity, case.recompute).to(dtype)
    if bias is not None:
        assert layer.router.selection_bias_E is not None
        assert layer.router.selection_bias_E.dtype == torch.float32, (
            "a cast of the module leaves the bias alone"
        )
        layer.router.selection_bias_E.copy_(bias)
    mine, local = (
        _load(layer, leaves, layout),
        slice(case.tokens * rank // world_size, case.tokens * (rank + 1) // world_size),
    )
    x_here = x[local].to(dtype).requires_grad_()
    mask_here = None if mask is None else mask[local]
    y, record = layer(x_here, mask_here, noise(range(case.tokens)[local]) if case.jitter else None)
    kept = torch.ones(x_here.shape[0], dtype=torch.bool) if mask_here is None else mask_here
    kept_BS = kept.view(case.sequences(world_size), -1)
    counts = record.counts_E.clone()
    tokens, sequences = kept_BS.sum().double(), kept_BS.any(1).sum().double()
    if world_size > 1:
        for count in (counts, tokens, sequences):
            dist.all_reduce(count)
    totals = Totals(tokens.clamp(min=1), sequences.clamp(min=1), world_size, counts.unsqueeze(0))
    share = losses(ModelOutput(torch.zeros((), dtype=dtype), (record,)), kept_BS, totals, case.balance)
    ((y * grad[local].to(dtype)).sum() + share.total).backward()
    total = share.total.detach().clone()
    if world_size > 1:
        dist.all_reduce(total)
    _compare("balancing losses", total.to(dtype), aux.detach())

    dropped = record.num_dropped.clone()
    if world_size > 1:
        dist.all_reduce(dropped)
    assert int(dropped) == expected.num_dropped
    assert torch.equal(counts, expected.counts_E)
    if case.choice == "expert":
        assert len(set(counts.tolist())) == 1
    else:
        assert int(counts.sum()) == (case.tokens if mask is None else int(mask.sum())) * case.top_k
    _compare("y", y, expected.y_TD[local])
    _compare("x.grad", x_here.grad, x_ref.grad[local] if x_ref.grad is not None else None)
    for name, (parameter, reference, sharded) in mine.items():
        got = parameter.grad
        assert got is not None, name
        if world_size > 1:  # what DeepSpeed does: sum over the ranks that hold the parameter
            got = _sum_over_holders(got, layout, rank, world_size) if sharded else got.clone()
            if not sharded:
                dist.all_reduce(got)
        _compare(f"{name}.grad", got, reference)
        assert torch.isfinite(got).all()


def _sum_over_holders(grad: Tensor, layout: ExpertLayout, rank: int, world_size: int) -> Tensor:
    gathered = [torch.empty_like(grad) for _ in range(world_size)]
    dist.all_gather(gathered, grad.contiguous())
    return torch.stack(gathered[rank % layout.size :: layout.size]).sum(0)


def _load(
    layer: SparseMoE, leaves: dict[str, Tensor], layout: ExpertLayout
) -> dict[str, tuple[torch.nn.Parameter, Tensor | None, bool]]:
    ids = layout.local_experts
    mine = slice(ids.start, ids.stop)
    out = {}
    for name, parameter in layer.named_parameters():
        value, grad = leaves[REFERENCE[name]].detach(), leaves[REFERENCE[name]].grad
        sharded = name.startswith("experts.")
        parameter.data.copy_(value[mine] if sharded else value)
        out[name] = (parameter, grad[mine] if sharded and grad is not None else grad, sharded)
    assert len(out) == len(leaves)
    return out


@pytest.mark.parametrize(("world_size", "ep"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_layer_equals_reference_on_several_ranks(world_size: int, ep: int, tmp_path: Path) -> None:
    run_ranks(_check, world_size, tmp_path, world_size, ep, CASES)


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2), pytest.param(4, 4, marks=pytest.mark.slow)])
def test_every_combination_of_switches_equals_reference(world_size: int, ep: int, tmp_path: Path) -> None:
    """Score x normalisation x groups x bias x capacity x shared expert, and who chooses: 252 on 1, 2 and 4 ranks.

    With balancing losses of all scopes at once, each by a weight of its own; where experts choose, with the z-loss.
    """
    assert len(COMBINATIONS) == 216 + 36
    run_ranks(_check, world_size, tmp_path, world_size, ep, COMBINATIONS)


@pytest.mark.parametrize(("world_size", "ep"), [(2, 2), (4, 2)])
def test_a_layer_in_float32_is_near_the_reference_on_several_ranks(
    world_size: int, ep: int, tmp_path: Path
) -> None:
    run_ranks(_check, world_size, tmp_path, world_size, ep, CASES, torch.float32)


def _check_by_onednn(rank: int, world_size: int, ep: int, cases: list[Case]) -> None:
    """As on a processor where oneDNN multiplies faster, if products were big."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Products, "of", lambda like, rows, weight: Products(like.dtype, by_onednn=rows > 0))
        _check(rank, world_size, ep, cases, torch.float32)


@needs_onednn
@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2), (4, 2)])
def test_a_layer_multiplied_by_onednn_is_near_the_reference(world_size: int, ep: int, tmp_path: Path) -> None:
    run_ranks(_check_by_onednn, world_size, tmp_path, world_size, ep, CASES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layer_equals_reference_on_one_rank(case: Case, dtype: torch.dtype) -> None:
    """In float32 by compiled rows, where there is a compiler."""
    check_case(case, 0, 1, ExpertLayout(case.experts), dtype)


def test_the_reference_refuses_anything_but_float64() -> None:
    case = CASES[0]
    with pytest.raises(ValueError, match="float64"):
        sparse_layer(_batch(case, 1)[0].float(), _weights(case), case.config)
