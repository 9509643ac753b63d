"""What a fine-tuning by low-rank adapters trains, and the rules of these settings."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat

from moe.config.base import Section, Size
from moe.config.model import ModelConfig

Target = Literal["attention", "experts", "shared_expert", "dense"]


def _ordered(value: Any) -> Any:
    """YAML has lists; a frozen page has tuples."""
    if isinstance(value, list) and len(set(map(str, value))) < len(value):
        raise ValueError("it must name each target once")
    return tuple(value) if isinstance(value, list) else value


class LoraConfig(Section):
    """W + alpha / rank B A in place of each targeted W, with only A and B trained (arXiv:2106.09685)."""

    rank: Size
    """Rows of each A and columns of each B; every expert has a pair of its own."""
    alpha: PositiveFloat
    """The adapter's weight is alpha / rank."""
    targets: Annotated[tuple[Target, ...], BeforeValidator(_ordered), Field(min_length=1)]
    """Which matrices have adapters: all projections of attention, the routed experts' gate, up and down, those of the
    shared expert, those of dense layers. All else is frozen: embedding, head, norms, routers, biases."""

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


def lora_faults(lora: LoraConfig | None, model: ModelConfig, bias_update_rate: float) -> list[str]:
    """What has no effect or cannot be, a sentence each."""
    if lora is None:
        return []
    moe, faults = model.moe, []
    present = {
        "attention": True,
        "experts": moe is not None,
        "shared_expert": moe is not None and moe.shared_expert_intermediate_size is not None,
        "dense": len(model.sparse_layers) < model.num_layers,
    }
    there = [target for target, found in present.items() if found]
    for target in lora.targets:
        if not present[target]:
            faults.append(
                f"lora.targets has {target}, but the model has none, so it has no effect. Remove it: there are "
                f"{', '.join(there)}."
            )
    if bias_update_rate:
        faults.append(
            f"balance.bias_update_rate is {bias_update_rate} with lora: selection biases belong to the model that is "
            f"adapted, and no adapter could carry what moved. Set balance.bias_update_rate=0."
        )
    return faults
