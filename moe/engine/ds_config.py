"""A recipe -> DeepSpeed's configuration; the only file that knows DeepSpeed's keys."""

import difflib
from typing import Any

from moe.config import RunConfig
from moe.errors import ConfigError

PASSED_THROUGH: dict[str, frozenset[str] | None] = {
    "zero_optimization": frozenset(
        {
            "contiguous_gradients",
            "reduce_scatter",
            "reduce_bucket_size",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "allgather_bucket_size",
            "overlap_comm",
            "round_robin_gradients",
            "ignore_unused_parameters",
        }
    ),
    "communication_data_type": None,
    "prescale_gradients": None,
    "gradient_predivide_factor": None,
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "comms_logger": frozenset({"enabled", "verbose", "prof_all", "debug", "prof_ops"}),
    "flops_profiler": frozenset(
        {
            "enabled",
            "recompute_fwd_factor",
            "profile_step",
            "module_depth",
            "top_modules",
            "detailed",
            "output_file",
        }
    ),
}
"""What a recipe's `deepspeed:` section may set: key -> its keys, or None for a single value."""

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
    """Raise `ConfigError` for keys that DeepSpeed would ignore in silence or that contradict our settings."""
    faults = []
    for key, value in section.items():
        inner = PASSED_THROUGH.get(key)
        if key not in PASSED_THROUGH:
            faults.append(_unknown(key, PASSED_THROUGH))
        elif inner is not None and not isinstance(value, dict):
            faults.append(f"deepspeed.{key} is {value!r}: it must be a block of {', '.join(sorted(inner))}.")
        elif inner is None and isinstance(value, dict):
            faults.append(f"deepspeed.{key} is a block: it must be a single value.")
        elif inner is not None:
            faults += [_unknown(f"{key}.{k}", {f"{key}.{i}" for i in inner}) for k in value if k not in inner]
    if faults:
        raise ConfigError("\n       ".join(faults))


def _unknown(key: str, known: Any) -> str:
    if key in OURS:
        return f"deepspeed.{key} follows from {OURS[key]}: set that, and remove it here."
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean deepspeed.{close[0]}?" if close else f"here are {', '.join(sorted(known))}."
    return f"deepspeed.{key}: DeepSpeed would ignore it, or it is not passed through; {hint}"
