"""A tiny sound recipe, for tests to use as it is or to break."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, settings

# A busy machine is no fault of ours.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

WriteRecipe = Callable[[dict[str, Any]], Path]


@pytest.fixture
def tiny_page() -> dict[str, Any]:
    """A run of 8 steps on a model of 2 layers and 8 experts, as plain data."""
    return {
        "name": "tiny",
        "seed": 7,
        "model": {
            "vocab_size": 512,
            "hidden_size": 32,
            "num_layers": 2,
            "max_sequence_length": 64,
            "attention": {"num_heads": 4, "num_kv_heads": 2},
            "moe": {"num_experts": 8, "top_k": 2, "expert_intermediate_size": 16},
        },
        "data": {"path": "data/tiny", "sequence_length": 32},
        "train": {
            "steps": 8,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp32",
            "optimizer": {"learning_rate": 1e-3},
        },
    }


@pytest.fixture
def write_recipe(tmp_path: Path) -> WriteRecipe:
    def write(page: dict[str, Any]) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(page, sort_keys=False), encoding="utf-8")
        return path

    return write
