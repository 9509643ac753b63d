"""A model, its tokenizer and names of tasks -> what EleutherAI's lm-evaluation-harness measures (arXiv:2405.14782)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import ConfigError


@dataclass(frozen=True)
class Score:
    """A metric of a task."""

    task: str
    metric: str
    """With the filter that answers went through, if any, such as "exact_match,strict-match"."""
    value: float
    standard_error: float | None


def measure(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> list[Score]:
    """Every metric of every task, in their order.

    `include_path`: a folder with further tasks; `num_fewshot`: examples before each question (None: the task's own
    number); `limit`: questions of each task (None: all). Raises `ConfigError`: lm-eval is not installed, a task is
    unknown, or its data cannot be had.
    """
    check_installed()
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ConfigError(
            f"--tasks has {unknown[0]!r}, which lm-eval does not know. `lm-eval ls tasks` lists those it does; "
            f"--include-path names a folder with others."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wrapped = HFLM(
        pretrained=model.to(device),
        backend="causal",
        tokenizer=tokenizer,
        batch_size=batch_size,
        device=device,
    )
    try:
        found = simple_evaluate(
            wrapped,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, ConnectionError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"lm-eval cannot run {', '.join(tasks)} ({reason}). Most tasks fetch their data from the Hub once: check "
            f"the network and HF_HUB_OFFLINE."
        ) from None
    assert found is not None  # None is for other ranks
    return [score for task, metrics in found["results"].items() for score in _scores(task, metrics)]


def check_installed() -> None:
    """Raise `ConfigError` without lm-eval."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--tasks needs lm-evaluation-harness, which is not installed. Install it: pip install 'turnout[evaluate]', "
            "or pip install lm_eval."
        ) from None


def _scores(task: str, metrics: dict[str, Any]) -> list[Score]:
    found = []
    for key, value in metrics.items():
        name, _, filtered = key.partition(",")
        if (
            name.endswith("_stderr")
            or isinstance(value, bool)
            or not isinstance(value, int | float)
            or not filtered
        ):
            continue
        error = metrics.get(f"{name}_stderr,{filtered}")
        spoken = name if filtered == "none" else key
        found.append(Score(task, spoken, float(value), error if isinstance(error, float) else None))
    return found
