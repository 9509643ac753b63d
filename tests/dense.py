"""Small dense models made by stock `transformers`."""

from pathlib import Path
from typing import Any

import torch

from tests.stock import write_tokenizer


def write_dense(folder: Path, model_type: str, **changes: Any) -> Path:
    """A stock model with random weights, wide enough that every matrix moves the logits, and a tokenizer."""
    import transformers

    page: dict[str, Any] = {
        "vocab_size": 112,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 3e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1234.0},
        "tie_word_embeddings": False,
        "initializer_range": 0.03,
        **changes,
    }
    config = transformers.AutoConfig.for_model(model_type, **page)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * drawn if "norm" in name else 0.25 * drawn)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
