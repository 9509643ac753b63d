"""A recipe -> DeepSpeed's configuration; the only file that knows DeepSpeed's keys."""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from moe.config import RunConfig, Section
from moe.config.base import LARGEST, faults, refuse


def _integral(value: Any) -> Any:
    """DeepSpeed's pages write 5e8, which is a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Bucket = Annotated[int, BeforeValidator(_integral), Field(gt=0, le=LARGEST)]


class ZeroSection(Section):
    reduce_bucket_size: Bucket = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Annotated[Bucket, Field(multiple_of=2)] = 500_000_000
    """Its buckets are aligned to pairs."""
    overlap_comm: bool = False
    round_robin_gradients: bool = False
    ignore_unused_parameters: bool = True


class CommsLoggerSection(Section):
    enabled: bool = False
    verbose: bool = False
    prof_all: bool = True
    debug: bool = False
    prof_ops: list[str] = Field(default_factory=list)


class DeepSpeedSection(Section):
    """What a recipe's `deepspeed:` block may set; only what is set there is passed on."""

    zero_optimization: ZeroSection = ZeroSection()
    communication_data_type: Literal["fp32", "bf16", "fp16"] = "fp32"
    memory_breakdown: bool = False
    comms_logger: CommsLoggerSection = CommsLoggerSection()


class _Page(Section):
    deepspeed: DeepSpeedSection


BLOCKS: dict[str, type[Section]] = {
    "zero_optimization": ZeroSection,
    "comms_logger": CommsLoggerSection,
}

OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.optimizer.gradient_clipping",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "bf16": "train.precision",
    "zero_optimization.stage": "parallel.zero_stage",
    "tensorboard": "logging.tensorboard",
}
"""DeepSpeed's keys that follow from our settings."""

FIXED = {
    "zero_optimization.reduce_scatter": "DeepSpeed needs it true for experts, and it is",
    "zero_optimization.contiguous_gradients": "DeepSpeed needs it true for experts, and it is",
    "prescale_gradients": "our losses are scaled to the global batch already",
    "gradient_predivide_factor": "our losses are scaled to the global batch already",
    "wall_clock_breakdown": "DeepSpeed's timers do not start with a model that returns a dataclass",
    "flops_profiler": "DeepSpeed's timers do not start with a model that returns a dataclass",
}
"""DeepSpeed's keys that would break the training, or crash it at the first step (seen with 0.19.8)."""


def make(run: RunConfig, accumulation: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`."""
    check(run.deepspeed)
    stage = run.parallel.zero_stage
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed averages local norms under stage 0 with expert parallelism (DeepSpeed#8475): we clip there.
        "gradient_clipping": run.train.optimizer.gradient_clipping if stage else 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": run.train.precision == "bf16"},
        "steps_per_print": None,
    }
    for key, value in run.deepspeed.items():
        made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
    return made


def check(section: dict[str, Any]) -> None:
    """Raise `ConfigError` for keys that DeepSpeed would ignore in silence or that contradict our settings.

    And for values that it would stumble over later.
    """
    known: dict[str, Any] = {}
    strange: list[str] = []
    for key, value in section.items():
        if key not in DeepSpeedSection.model_fields:
            strange.append(_unknown(key, DeepSpeedSection.model_fields))
        elif key in BLOCKS and isinstance(value, dict):
            inner = BLOCKS[key].model_fields
            strange += [
                _unknown(f"{key}.{k}", [f"{key}.{i}" for i in inner]) for k in value if k not in inner
            ]
            known[key] = {k: v for k, v in value.items() if k in inner}
        else:
            known[key] = value
    refuse(strange + faults(_Page, {"deepspeed": known}))


def _unknown(key: str, known: Iterable[str]) -> str:
    if key in OURS:
        return f"deepspeed.{key} follows from {OURS[key]}: set that, and remove it here."
    if key in FIXED:
        return f"deepspeed.{key} cannot be set: {FIXED[key]}. Remove it."
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean deepspeed.{close[0]}?" if close else f"here are {', '.join(sorted(known))}."
    name = key if len(key) <= 100 else f"{key[:97]}..."
    return f"deepspeed.{name}: DeepSpeed would ignore it, or it is not passed through; {hint}"
