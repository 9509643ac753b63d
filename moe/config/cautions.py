"""What a recipe may ask for, and should know before it starts."""

from moe.config.model import ModelConfig


def cautions(model: ModelConfig) -> list[str]:
    """A sentence for each setting of the model that is sound, but not what one trains a language model with."""
    if model.moe is None or model.moe.router_choice == "token":
        return []
    if model.moe.router_choice == "expert":
        return [
            "model.moe.router_choice is expert: which tokens an expert takes hangs on all tokens of the micro-batch, "
            "later ones too. Under a causal loss this leaks the future, so losses look better than the model is, and "
            "it cannot generate text as it is."
        ]
    return [
        "model.moe.router_choice is round_robin: experts are dealt out whatever the weights, so the model learns no "
        "routing. Use it to measure speed, not to train."
    ]
