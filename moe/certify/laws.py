"""One step by itself -> how far it is from the rules it must obey whatever the layout, computed here in float64.

A fault that one process has too shows in no comparison with it; it shows here. L sparse layers, E experts.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from moe.certify.parts import Deviation, by_expert, gradients, moved
from moe.certify.seen import State, Step
from moe.config import RunConfig


def laws(step: Step, before: State, run: RunConfig, number: int) -> Iterator[Deviation]:
    """`before`: the state before the step, the run's number `number`."""
    yield _finite(step, number)
    yield Deviation(
        "copies on all ranks", math.inf if step.unequal else 0.0, 0.0, number, step.unequal, "ranks differ"
    )
    lowest, highest = min(step.gradient_norms), max(step.gradient_norms)
    said = f"ranks clip by norms of their own, {lowest:.6g} to {highest:.6g}"
    yield Deviation(
        "clip factor, over ranks", (highest - lowest) / max(highest, 1e-30), 1e-6, number, "", said
    )
    if step.tokens_per_expert is not None:
        yield _counted(step, run, number)
        yield _idle_experts(step, before, run, number)
        if run.balance.bias_update_rate:
            yield _bias(step, before, run, number)
    yield _adamw(step, before, run, number)


def _finite(step: Step, number: int) -> Deviation:
    numbers = (step.total, step.cross_entropy, step.load_balancing, step.router_z, step.gradient_norm)
    bad = next((key for key, tensor in step.state.items() if not tensor.isfinite().all()), "")
    sound = not bad and all(map(math.isfinite, numbers))
    return Deviation("finite", 0.0 if sound else math.inf, 0.0, number, bad, "NaN or infinity")


def _counted(step: Step, run: RunConfig, number: int) -> Deviation:
    """Tokens that count, and no others, choose top_k experts; where experts choose, as many on average, rounded up."""
    assert step.tokens_per_expert is not None
    assert run.model.moe is not None
    wanted = step.num_tokens * run.model.moe.top_k
    found_L = step.tokens_per_expert.sum(1).tolist()
    slack = 0
    if run.model.moe.router_choice == "expert":
        slack = run.model.moe.num_experts * (run.train.global_batch_size // run.train.micro_batch_size)
    layer = next((i for i, found in enumerate(found_L) if not wanted <= found <= wanted + slack), None)
    worst = max((abs(found - wanted) for found in found_L), default=0)
    if layer is None:
        return Deviation("tokens per expert / padding", 0.0, 0.0, number)
    said = (
        f"{found_L[layer]} choices were counted, but {step.num_tokens} tokens that are not padding x top_k "
        f"{run.model.moe.top_k} = {wanted}"
    )
    return Deviation(
        "tokens per expert / padding", worst / max(wanted, 1), 0.0, number, f"sparse layer {layer}", said
    )


def _idle_experts(step: Step, before: State, run: RunConfig, number: int) -> Deviation:
    """An expert without tokens gets a gradient of zero, not a small one and not NaN."""
    assert step.tokens_per_expert is not None
    got = gradients(step.state, before, run.train.optimizer)
    found, worst, first, idle = {}, 0.0, "", 0
    for layer, counts_E in zip(run.model.sparse_layers, step.tokens_per_expert, strict=True):
        for expert in (counts_E == 0).nonzero().flatten().tolist():
            idle += 1
            for key in by_expert(got, f"/layers.{layer}.", expert):
                found[key] = _beyond_rounding(got[key], key, step.state, before)
    for key, far in found.items():
        if not far <= worst:
            worst, first = far, first or key
    return Deviation(
        "zero-token experts", worst, 0.0, number, first, f"gradient of one of {idle} experts without a token"
    )


def _beyond_rounding(gradient: Tensor, key: str, state: State, before: State) -> float:
    """The largest element that the moment's own rounding, to float32, does not explain."""
    moment = next(f"{kind}{key}" for kind in ("exp_avg", "momentum") if f"{kind}{key}" in state)
    if not gradient.isfinite().all():
        return math.inf
    rounding = before[moment].double().abs() * 1e-5
    return float((gradient.abs() - rounding).clamp(min=0).max())


def _bias(step: Step, before: State, run: RunConfig, number: int) -> Deviation:
    """The bias rises where an expert has less than the mean load and falls where it has more (arXiv:2408.15664)."""
    assert step.tokens_per_expert is not None
    rate, worst, first, said = run.balance.bias_update_rate, 0.0, "", ""
    for layer, counts_E in zip(run.model.sparse_layers, step.tokens_per_expert, strict=True):
        load_E = counts_E.double()
        mean = float(load_E.mean())
        below_E = mean - load_E
        right_E = rate * (below_E.sign() if run.balance.bias_update == "sign" else below_E / max(mean, 1e-9))
        key = f"weight/layers.{layer}.ffn.router.selection_bias_E"
        moved_E = moved(step.state[key], before[key])
        # float32 keeps seven digits of the bias, not of its step.
        far_E = (moved_E - right_E).abs() - 2e-7 * step.state[key].double().abs()
        far = float(far_E.clamp(min=0).max()) / rate
        if not far <= max(worst, 1e-5):
            expert = int(far_E.argmax())
            worst, first = far, key
            said = (
                f"expert {expert} with {int(counts_E[expert])} tokens, of {mean:.6g} on average, moved by "
                f"{float(moved_E[expert]):+.3g}, not {float(right_E[expert]):+.3g}"
            )
    return Deviation("selection bias", worst, 1e-5, number, first, said)


def _adamw(step: Step, before: State, run: RunConfig, number: int) -> Deviation:
    """The weights and the second moment follow from the first moment by AdamW's rule (arXiv:1711.05101, alg. 2)."""
    config = run.train.optimizer
    got = gradients(step.state, before, config)
    worst, first = 0.0, ""
    for key, exp_avg in step.state.items():
        state, _, name = key.partition("/")
        if state != "exp_avg":
            continue
        second, weight = step.state[f"exp_avg_sq/{name}"].double(), f"weight/{name}"
        decayed = config.beta2 * before[f"exp_avg_sq/{name}"].double()
        far = _apart(second, decayed + (1 - config.beta2) * got[f"/{name}"].square())
        root = (second / (1 - config.beta2 ** (number + 1))).sqrt() + config.eps
        update = step.learning_rate * exp_avg.double() / (1 - config.beta1 ** (number + 1)) / root
        was = before[weight].double()
        size = float(update.norm())
        fits = [
            float((step.state[weight].double() - (was * (1 - step.learning_rate * decay) - update)).norm())
            for decay in (config.weight_decay, 0.0)  # matrices decay, norms and biases do not
        ]
        rounding = 2e-7 * float(was.norm())
        far = max(far, max(0.0, min(fits) - rounding) / size if size else 0.0)
        if not far <= max(worst, 1e-3):
            worst, first = far, key
    return Deviation("AdamW's rule", worst, 1e-3, number, first, "beside a step of the rule")


def _apart(tensor: Tensor, other: Tensor) -> float:
    size = float(other.norm())
    far = float(torch.dist(tensor, other))
    return far / size if size else (0.0 if far == 0 else math.inf)
