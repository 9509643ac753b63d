"""`turnout certify` passes what is right, and names each of the field's silent faults where it is planted."""

from functools import partial

import pytest

from moe.certify.parts import Deviation
from moe.certify.prove import Proof, certify
from tests.dist.faults import plant
from tests.dist.layouts import tiny

RECIPE = tiny(
    model={
        "moe": {
            "num_experts": 16,
            "top_k": 2,
            "expert_intermediate_size": 48,
            "router_score": "sigmoid",
            "selection_bias": True,
        }
    },
    balance={
        "sequence_loss_weight": 0.0,
        "global_batch_loss_weight": 0.01,
        "bias_update_rate": 0.01,
    },
)
PLANTED = {
    "2 ranks, EP 2, ZeRO 1": "expert gradients doubled",
    "2 ranks, EP 2, ZeRO 0": "each rank's own norm",
    "2 ranks, EP 2, ZeRO 0, accumulation 2": "mean of local norms",
    "2 ranks, EP 2, ZeRO 1, recompute block": "balancing twice",
    "2 ranks, EP 1, ZeRO 1, recompute experts": "balancing twice in gradients",
    "2 ranks, EP 2, ZeRO 2, resume": "momentum dropped",
    "2 ranks, EP 1, ZeRO 2, resize": "momentum dropped",
}
LAYOUTS = [
    *("ep=2,zero=1", "ep=2,zero=0,accumulation=1/2", "ep=2,zero=1,recompute=block"),
    *("ep=1,zero=1,recompute=experts", "ep=2,zero=2,then=resume", "ep=1,zero=2,then=resize", "ep=1,zero=1"),
]


@pytest.fixture(scope="module")
def proof() -> Proof:
    return certify(RECIPE, 2, LAYOUTS, plant=partial(plant, PLANTED))


def _findings(proof: Proof, layout: str) -> tuple[Deviation, ...]:
    return next(trial for trial in proof.trials if str(trial.layout) == layout).findings


def test_what_is_right_passes_beside_them(proof: Proof) -> None:
    assert [finding.check for finding in _findings(proof, "2 ranks, EP 1, ZeRO 1")] == []
    assert not proof.passed


@pytest.mark.parametrize(
    ("layout", "check", "tensor", "said"),
    [
        ("2 ranks, EP 2, ZeRO 1", "gradient of experts", "/layers.0.ffn.experts", "2 times"),
        ("2 ranks, EP 2, ZeRO 0", "clip factor, over ranks", "", "norms of their own"),
        ("2 ranks, EP 2, ZeRO 0, accumulation 2", "clip factor", "", "times"),
        ("2 ranks, EP 2, ZeRO 1, recompute block", "load-balancing loss in the total", "", "2 times"),
        (
            "2 ranks, EP 1, ZeRO 1, recompute experts",
            "gradient of router",
            "router",
            "load-balancing loss counted 2 times",
        ),
        ("2 ranks, EP 2, ZeRO 2, resume", "exp_avg after resume", "exp_avg/", ""),
        ("2 ranks, EP 1, ZeRO 2, resize", "exp_avg after resize from one process", "exp_avg/", ""),
    ],
)
def test_a_fault_in_a_layout_is_named(layout: str, check: str, tensor: str, said: str, proof: Proof) -> None:
    findings = _findings(proof, layout)
    found = {finding.check: finding for finding in findings}[check]
    assert tensor in found.tensor
    assert said in found.said


@pytest.mark.parametrize(
    ("fault", "check", "said"),
    [
        ("bias backwards", "selection bias", "moved by"),
        ("padding counted", "tokens per expert / padding", "tokens that are not padding x top_k 2"),
        ("padding in the loss", "cross-entropy, with other padding", "times"),
    ],
)
def test_a_fault_that_one_process_has_too_is_named(fault: str, check: str, said: str) -> None:
    proof = certify(RECIPE, 1, ["accumulation=2"], plant=partial(plant, {"": fault}))
    assert len(proof.trials) == 2
    found = {finding.check: finding for finding in proof.trials[0].findings}[check]
    assert said in found.said


def test_a_training_that_ends_early_fails_with_its_last_words_and_the_others_go_on() -> None:
    layouts = ["ep=1,zero=1", "ep=2,zero=1/2"]
    dying = {"2 ranks, EP 1, ZeRO 1": "dies", "2 ranks, EP 2, ZeRO 2": "hangs"}
    proof = certify(RECIPE, 2, layouts, plant=partial(plant, dying), job_s=20)
    outcomes = {str(trial.layout): trial.findings for trial in proof.trials}
    assert [finding.check for finding in outcomes["2 ranks, EP 1, ZeRO 1"]] == ["runs to its end"]
    assert "no such luck" in outcomes["2 ranks, EP 1, ZeRO 1"][0].said
    assert "within 20 s" in outcomes["2 ranks, EP 2, ZeRO 2"][0].said
    assert outcomes["2 ranks, EP 2, ZeRO 1"] == ()
