"""What the start of training says to people."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from moe import log, train
from moe.config import RunConfig


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ({"router_choice": "expert", "normalize_top_k": False}, "leaks the future"),
        ({"router_choice": "round_robin"}, "learns no routing"),
        ({}, None),
    ],
)
def test_a_caution_is_said_once_by_the_first_rank_alone(
    moe: dict[str, Any], said: str | None, tiny_page: dict[str, Any]
) -> None:
    tiny_page["model"]["moe"].update(moe)
    tiny_page["balance"] = {"sequence_loss_weight": 0.0}
    run = RunConfig.model_validate(tiny_page)
    heard: list[str] = []
    ear = logging.Handler()
    ear.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]  # a test's ear
    log.get().addHandler(ear)
    try:
        for speaks in (True, False):
            ranks: Any = SimpleNamespace(speaks=speaks, world_size=1, device=SimpleNamespace(type="cpu"))
            sources: Any = SimpleNamespace(uses=())
            state: Any = SimpleNamespace(step=0)
            train._announce(run, sources, ranks, state)
    finally:
        log.get().removeHandler(ear)
    cautions = [sentence for sentence in heard if "router_choice is" in sentence]
    assert len(cautions) == (0 if said is None else 1)
    assert said is None or said in cautions[0]
    assert sum("cannot be exported" in sentence for sentence in heard) == len(cautions)
