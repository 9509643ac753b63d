"""A recipe -> DeepSpeed's configuration; the only file that knows DeepSpeed's keys."""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field

from moe.config import RunConfig, Section
from moe.config.base import LARGEST, Count, faults, refuse


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
    sub_group_size: Bucket = 1_000_000_000
    """ZeRO 3: elements that the optimizer steps at a time."""
    stage3_param_persistence_threshold: Count = 100_000
    """ZeRO 3: parameters of at most so many elements stay whole on every rank."""
    stage3_prefetch_bucket_size: Bucket = 50_000_000
    stage3_max_live_parameters: Bucket = 1_000_000_000
    stage3_max_reuse_distance: Bucket = 1_000_000_000


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
    "zero_optimization.offload_optimizer": "parallel.offload",
    "zero_optimization.offload_param": "parallel.offload",
    "data_types": "train.precision",
    "tensorboard": "logging.tensorboard",
}
"""DeepSpeed's keys that follow from our settings."""

FIXED = {
    "zero_optimization.reduce_scatter": "DeepSpeed needs it true for experts, and it is",
    "zero_optimization.contiguous_gradients": "DeepSpeed needs it true for experts, and it is",
    "prescale_gradients": "our losses are scaled to the global batch already",
    "gradient_predivide_factor": "our losses are scaled to the global batch already",
    "wall_clock_breakdown": "DeepSpeed's timers have not been tried with our steps",
    "flops_profiler": "DeepSpeed's timers have not been tried with our steps",
}
"""DeepSpeed's keys that would break the training (seen with 0.19.8), or are not known to leave it as it is."""


ONLY_UNDER = {
    **dict.fromkeys(
        (
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "allgather_bucket_size",
            "round_robin_gradients",
            "ignore_unused_parameters",
        ),
        (1, 2),
    ),
    **dict.fromkeys(
        (
            "sub_group_size",
            "stage3_param_persistence_threshold",
            "stage3_prefetch_bucket_size",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
        ),
        (3,),
    ),
    **dict.fromkeys(("reduce_bucket_size", "overlap_comm"), (1, 2, 3)),
}
"""Keys of zero_optimization and the stages that read them."""


def make(run: RunConfig, accumulation: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`."""
    stage = run.parallel.zero_stage
    check(run.deepspeed, stage)
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed averages local norms under stage 0 with expert parallelism (DeepSpeed#8475): we clip there.
        "gradient_clipping": run.train.optimizer.gradient_clipping if stage else 0.0,
        "zero_optimization": {"stage": stage, **_offload(run.parallel.offload)},
        "zero_allow_untested_optimizer": True,
        # Ours steps host memory with torch's fused kernel; DeepSpeed's own takes minutes to compile.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": run.train.precision == "bf16"},
        # Micro-batches add up in float32 also where gradients are made in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }
    for key, value in run.deepspeed.items():
        made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
    return made


def _offload(offload: str) -> dict[str, Any]:
    place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    blocks = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}
    return dict.fromkeys(blocks[offload], place)


def check(section: dict[str, Any], stage: int) -> None:
    """Raise `ConfigError` for keys that DeepSpeed would ignore in silence or that contradict our settings.

    And for keys that have no effect under this ZeRO `stage`, and values that it would stumble over later.
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
            if key == "zero_optimization":
                strange += [_elsewhere(k, stage) for k in known[key] if stage not in ONLY_UNDER[k]]
        else:
            known[key] = value
    refuse(strange + faults(_Page, {"deepspeed": known}))


def _elsewhere(key: str, stage: int) -> str:
    stages = " or ".join(map(str, ONLY_UNDER[key]))
    return (
        f"deepspeed.zero_optimization.{key} is set, but parallel.zero_stage is {stage}, which does not read it, so it "
        f"has no effect. Remove it, or use zero_stage {stages}."
    )


def _unknown(key: str, known: Iterable[str]) -> str:
    if key in OURS:
        return f"deepspeed.{key} follows from {OURS[key]}: set that, and remove it here."
    if key in FIXED:
        return f"deepspeed.{key} cannot be set: {FIXED[key]}. Remove it."
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean deepspeed.{close[0]}?" if close else f"here are {', '.join(sorted(known))}."
    name = key if len(key) <= 100 else f"{key[:97]}..."
    return f"deepspeed.{name}: DeepSpeed would ignore it, or it is not passed through; {hint}"
