"""Sparse layers of any shape and any switches, on one rank, against the float64 reference: forward and gradients."""

from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from moe.sparse import Capacity, ExpertLayout
from tests.dist.test_sparse_layer import Case, check_case


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any sizes from 1 on, nothing a multiple of anything; switches that a recipe may combine."""
    size = st.integers(1, 6)
    per_group, num_groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    experts = per_group * num_groups
    top_k = draw(st.integers(1, experts))
    choice = draw(st.sampled_from(["token", "token", "token", "expert", "round_robin"]))
    groups = None
    if choice == "token" and draw(st.booleans()):
        score = draw(st.sampled_from(["max", "top2_sum"] if per_group > 1 else ["max"]))
        groups = (num_groups, draw(st.integers(-(-top_k // per_group), num_groups)), score)
    capacity = None
    if choice == "token" and draw(st.booleans()):
        capacity = Capacity(draw(st.floats(0.05, 2.0)), draw(st.sampled_from(["score", "position"])))
    shared = draw(st.none() | size)
    return Case(
        "drawn",
        tokens=draw(st.integers(1, 12)),
        hidden=draw(size),
        inner=draw(size),
        experts=experts,
        top_k=top_k,
        normalize=choice != "expert" and draw(st.booleans()),
        shared=shared,
        shared_gate=shared is not None and draw(st.booleans()),
        masked=draw(st.sampled_from(["none", "none", "some", "all"])),
        routing=draw(st.sampled_from(["free", "free", "one", "starved"])),
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        router_bias=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        groups=groups,
        bias=choice == "token" and draw(st.booleans()),
        capacity=capacity,
        jitter=draw(st.sampled_from([0.0, 0.0, 0.3])),
        choice=choice,
        activation=draw(st.sampled_from(["swiglu", "swiglu", "gpt_oss"])),
        limit=draw(st.sampled_from([None, None, 0.7])),
        expert_bias=draw(st.booleans()),
        latent=draw(st.none() | size),
        recompute=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=150, deadline=None)
@given(cases())
@example(Case("one token", tokens=1, top_k=1, normalize=False))
@example(Case("one token, experts choose", tokens=1, choice="expert", normalize=False, shared=3))
@example(Case("one token, all masked", tokens=1, masked="all"))
@example(Case("one token, latent", tokens=1, latent=1, expert_bias=True, recompute=True))
@example(Case("all masked, experts choose", tokens=5, masked="all", choice="expert", normalize=False))
@example(Case("one of everything", tokens=1, hidden=1, inner=1, experts=1, top_k=1, normalize=False))
@example(Case("most experts empty", tokens=2, experts=12, top_k=1, normalize=False, score="sigmoid"))
@example(Case("a capacity of one row", tokens=9, experts=2, top_k=2, capacity=Capacity(0.05, "position")))
def test_a_layer_of_any_shape_equals_the_reference(case: Case) -> None:
    event(f"{case.choice}, capacity {case.capacity is not None}, {case.masked} masked")
    check_case(case, 0, 1, ExpertLayout(case.experts))
