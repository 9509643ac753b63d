"""What a run may change when it goes on: how it is computed; and what it may not: what is trained."""

from pathlib import Path
from typing import Any

import pytest

from moe import recipe
from moe.checkpoint import identity
from moe.config import RunConfig
from moe.errors import CheckpointError

EXPERTS_CHOOSE = [
    "model.moe.router_choice=expert",
    "model.moe.normalize_top_k=false",
    "balance.sequence_loss_weight=0",
]


@pytest.mark.parametrize(
    ("overrides", "counts"),
    [
        ([], False),
        (["balance.router_jitter=0.1"], False),
        (["balance.capacity_factor=1.5"], True),
        (["balance.micro_batch_loss_weight=0.1"], True),
        (EXPERTS_CHOOSE, True),
    ],
)
def test_the_micro_batch_is_part_of_the_training_where_something_counts_within_it(
    overrides: list[str], counts: bool, tiny_page: dict[str, Any], tmp_path: Path
) -> None:
    def run(*more: str) -> RunConfig:
        page = recipe.yaml.safe_dump(tiny_page)
        return recipe.parse(RunConfig, page, [f"run_dir={tmp_path}", *overrides, *more], source="recipe.yaml")

    (tmp_path / "recipe.yaml").write_text(recipe.dump(run()))
    identity.check(run(), "")
    if counts:
        with pytest.raises(CheckpointError, match=r"train\.micro_batch_size was 2 and is 4"):
            identity.check(run("train.micro_batch_size=4"), "")
    else:
        identity.check(run("train.micro_batch_size=4"), "")
    with pytest.raises(CheckpointError, match=r"balance\.router_jitter was .* and is 0\.25"):
        identity.check(run("balance.router_jitter=0.25"), "")
