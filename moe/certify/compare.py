"""What was seen in a layout, beside one process -> how far each quantity is off, and whether that is too far.

L sparse layers, E experts.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.certify.laws import laws
from moe.certify.parts import Deviation, family, gradients, update_size
from moe.certify.seen import Seen, State, Step
from moe.config import RunConfig
from moe.config.model import Precision


@dataclass(frozen=True)
class Bounds:
    """Largest deviations, relative, that rounding explains."""

    loss: float
    gradient: float
    """Of a family of weights; also of the norm and the clip."""
    step: float
    """Of how far weights have moved: those whose gradient is rounding alone move as far as others."""
    counts: float
    """Share of choices that differ, a step: two scores may be equal but for rounding."""
    muon: bool
    """Whether Muon's weights can be compared: it makes directions that are rounding alone as long as all others."""

    def after(self, moved: float) -> "Bounds":
        """Once a share `moved` of choices went elsewhere: what was learned from those tokens differs as a whole."""
        root = math.sqrt(moved)
        return Bounds(self.loss + moved, self.gradient + root, self.step + root, self.counts, self.muon)


BOUNDS: dict[Precision, Bounds] = {
    "fp32": Bounds(loss=1e-5, gradient=5e-5, step=2e-2, counts=0.0, muon=True),
    "bf16": Bounds(loss=1e-2, gradient=1e-1, step=3e-1, counts=0.05, muon=False),
}
LEAST_CHOICES = 100
"""Of fewer than these, one that differs is a large share of all and says little."""


Pieces = Mapping[str, Mapping[str, Tensor]]
"""Term of the loss -> its part of the first step's gradients, before the clip."""


def compare(seen: Seen, reference: Seen, run: RunConfig, pieces: Pieces | None = None) -> list[Deviation]:
    """Every quantity of every step; `run`: the small recipe in the layout of `seen`. Causes come before effects.

    `pieces` help to say where a wrong gradient comes from.
    """
    bounds = BOUNDS[run.train.precision]
    found = list(_beginning(seen, reference)) if seen.first == 0 else []
    for index, step in enumerate(seen.steps):
        number = seen.first + index
        beside = reference.steps[number - reference.first]
        before, before_beside = state_before(seen, number), state_before(reference, number)
        found += laws(step, before, run, number)
        elsewhere = _counts(step, beside, bounds.counts * (1 + number), number)
        found += elsewhere
        if bounds.counts:
            bounds = bounds.after(max((deviation.deviation for deviation in elsewhere), default=0.0))
        found += _losses(step, beside, run, bounds, number)
        known = pieces if number == 0 and pieces else {}
        found += _gradients(_Two(step, before), _Two(beside, before_beside), run, bounds, number, known)
        found += _moves(step.state, beside.state, reference.before, bounds, number)
    return found


def piece(seen: Seen, without: Seen, run: RunConfig) -> dict[str, Tensor]:
    """What a term adds to the first step's gradients; `without`: the same training without the term."""
    whole, rest = (
        {
            key: gradient / clip_factor(run.train.optimizer.gradient_clipping, each.steps[0].gradient_norm)
            for key, gradient in gradients(each.steps[0].state, each.before, run.train.optimizer).items()
        }
        for each in (seen, without)
    )
    return {key: whole[key] - rest[key] for key in whole}


def equal_states(check: str, state: State, other: State, step: int) -> list[Deviation]:
    """To the bit."""
    return [_worst(check, step, 0.0, _differences(state, other))]


def state_before(seen: Seen, number: int) -> State:
    """The state before step `number`."""
    return seen.before if number == seen.first else seen.steps[number - seen.first - 1].state


@dataclass(frozen=True)
class _Two:
    """A step, and the state before it."""

    step: Step
    before: State

    def gradients(self, run: RunConfig) -> dict[str, Tensor]:
        return gradients(self.step.state, self.before, run.train.optimizer)


def _beginning(seen: Seen, reference: Seen) -> Iterator[Deviation]:
    yield _worst("initial weights", 0, 0.0, _differences(seen.before, reference.before))


def _differences(state: State, other: State) -> dict[str, float]:
    """Relative distance of each tensor; a missing one is infinitely far."""
    return {
        key: _distance(state[key], other[key]) if key in state and key in other else math.inf
        for key in sorted(state.keys() | other.keys())
    }


def _distance(tensor: Tensor, other: Tensor) -> float:
    if torch.equal(tensor, other):
        return 0.0
    if tensor.shape != other.shape:
        return math.inf
    return float((tensor.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))


def _worst(check: str, step: int, bound: float, by_tensor: Mapping[str, float], said: str = "") -> Deviation:
    """The largest deviation, with the first tensor beyond the bound."""
    largest = max(by_tensor.values(), default=0.0)
    first = next((key for key, far in by_tensor.items() if not far <= bound), "")
    return Deviation(check, largest, bound, step, first, said)


def _counts(step: Step, beside: Step, bound: float, number: int) -> list[Deviation]:
    if step.tokens_per_expert is None or beside.tokens_per_expert is None:
        return []
    moved_L = (step.tokens_per_expert - beside.tokens_per_expert).abs().sum(1).double()
    shares = (moved_L / beside.tokens_per_expert.sum(1).clamp(min=LEAST_CHOICES)).tolist()
    by_layer = {f"sparse layer {layer}": share for layer, share in enumerate(shares)}
    said = "share of choices that differ from one process"
    return [_worst("tokens per expert", number, bound, by_layer, said)]


def _losses(step: Step, beside: Step, run: RunConfig, bounds: Bounds, number: int) -> Iterator[Deviation]:
    ratios = {
        "load-balancing loss": (step.load_balancing, beside.load_balancing),
        "router z-loss": (step.router_z, beside.router_z),
        "loss of prediction modules": (step.further, beside.further),
        "cross-entropy": (step.cross_entropy, beside.cross_entropy),
    }
    for check, (ours, theirs) in ratios.items():
        yield Deviation(check, _relative(ours, theirs), bounds.loss, number, "", _times(ours, theirs))
    if run.model.moe is not None:
        # What of the total is left for balancing, in whatever scopes; it is small beside the total, and so is known
        # less well.
        ours, theirs = auxiliary(step, run), auxiliary(beside, run)
        known = bounds.loss + 4e-7 * abs(beside.total) / max(abs(theirs), 1e-30)
        if theirs and known < 0.5:
            yield Deviation(
                "load-balancing loss in the total",
                _relative(ours, theirs),
                known,
                number,
                "",
                _times(ours, theirs),
            )
    yield Deviation(
        "loss", _relative(step.total, beside.total), bounds.loss, number, "", _times(step.total, beside.total)
    )


def auxiliary(step: Step, run: RunConfig) -> float:
    """Weighted balancing losses of all layers, as they are in the total."""
    balance = run.balance
    if not (
        balance.sequence_loss_weight or balance.micro_batch_loss_weight or balance.global_batch_loss_weight
    ):
        return 0.0
    router_z = balance.router_z_loss_weight * step.router_z * len(run.model.sparse_layers)
    return step.total - step.cross_entropy - router_z - run.train.prediction_loss_weight * step.further


def _relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-12) if ours != theirs else 0.0


def _times(ours: float, theirs: float) -> str:
    return f"{ours:.6g} for {theirs:.6g}" + (f", {ours / theirs:.3g} times" if theirs else "")


def _gradients(
    ours: _Two, theirs: _Two, run: RunConfig, bounds: Bounds, number: int, pieces: Pieces
) -> list[Deviation]:
    """The norm and the clip, then each family, the worst first.

    What the optimizer got is the gradient times the clip factor. The factor is what all families have in common;
    what they have not is the gradient's own fault.
    """
    clip = run.train.optimizer.gradient_clipping
    got = ours.gradients(run)
    factor_beside = clip_factor(clip, theirs.step.gradient_norm)
    expected = {key: gradient / factor_beside for key, gradient in theirs.gradients(run).items()}
    families: dict[str, list[str]] = {}
    for key in expected:
        families.setdefault(family(key), []).append(key)
    scales = {name: _scale(got, expected, keys) for name, keys in families.items()}
    factor = _median([scale for scale in scales.values() if scale and math.isfinite(scale)] or [1.0])
    norm = _norm(got.values()) / factor
    right = clip_factor(clip, norm)
    reported = ours.step.gradient_norm
    said = f"{reported:.6g} reported, {norm:.6g} by the gradients"
    found = [Deviation("gradient norm", _relative(reported, norm), bounds.gradient, number, "", said)]
    said = f"{factor:.6g} for {right:.6g}, {factor / right:.4g} times"
    found.append(Deviation("clip factor", _relative(factor, right), bounds.gradient, number, "", said))
    off = {key: got[key] / factor - expected[key] for key in expected if key in got}
    source = _source(off, pieces)
    by_family = []
    for name, keys in families.items():
        size = _norm(expected[key] for key in keys)
        by_key = {key: _ratio(_norm([off[key]]) if key in off else math.inf, size) for key in keys}
        far = math.hypot(*by_key.values())
        right_size = far <= bounds.gradient
        first = next((key for key in keys if not by_key[key] <= 0.1 * max(by_key.values())), keys[0])
        said = f"{scales[name] / factor:.4g} times" + ("" if right_size else source)
        tensor = "" if right_size else first
        by_family.append(Deviation(f"gradient of {name}", far, bounds.gradient, number, tensor, said))
    return found + sorted(by_family, key=lambda deviation: -deviation.deviation)


def _source(off: Mapping[str, Tensor], pieces: Pieces) -> str:
    """The term of the loss whose gradient, counted otherwise than once, explains what is off."""
    for term, piece_ in pieces.items():
        squares = sum(float(gradient.square().sum()) for gradient in piece_.values())
        if not squares or off.keys() != piece_.keys():
            continue
        more = sum(float((off[key] * piece_[key]).sum()) for key in piece_) / squares
        rest = _norm(off[key] - more * piece_[key] for key in piece_)
        if rest < 0.1 * _norm(off.values()):
            return f", as if the {term} counted {1 + more:.3g} times"
    return ""


def clip_factor(clip: float, norm: float) -> float:
    """What gradients are multiplied by, as torch and DeepSpeed do it; `clip` 0: never."""
    return min(1.0, clip / (norm + 1e-6)) if clip else 1.0


def _scale(got: State, expected: State, keys: Sequence[str]) -> float:
    """The number that `expected` is best multiplied by to be `got`."""
    squares = sum(float(expected[key].square().sum()) for key in keys)
    products = sum(float((got[key] * expected[key]).sum()) for key in keys if key in got)
    return products / squares if squares else 0.0


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


def _ratio(far: float, size: float) -> float:
    return far / size if size else (0.0 if far == 0 else math.inf)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _moves(state: State, beside: State, before: State, bounds: Bounds, number: int) -> Iterator[Deviation]:
    """Weights and moments after the step, by family, beside how far one process has moved them since `before`."""
    families: dict[tuple[str, str], list[str]] = {}
    for key in beside:
        kind, _, name = key.partition("/")
        stepped = f"exp_avg/{name}" in beside or (bounds.muon and f"momentum/{name}" in beside)
        if kind in ("weight", "exp_avg_sq") and stepped:
            families.setdefault((kind, family(key)), []).append(key)
    worst = Deviation("optimizer step", 0.0, bounds.step, number)
    for (kind, name), keys in families.items():
        size = math.hypot(*(update_size(beside[key], before[key]) for key in keys))
        # What float32 rounds of a weight is much beside a small step.
        by_key = {
            key: max(0.0, update_size(state[key], beside[key]) - 2e-7 * float(beside[key].double().norm()))
            if key in state
            else math.inf
            for key in keys
        }
        far = _ratio(math.hypot(*by_key.values()), size)
        if not far <= worst.deviation:
            first = next((key for key in keys if not by_key[key] <= 0.1 * max(by_key.values())), keys[0])
            said = f"{kind} of {name}, beside how far one process has moved them"
            worst = Deviation("optimizer step", far, bounds.step, number, first, said)
    yield worst
