"""Every knob of a run: typed, strict, frozen."""

from moe.config.attention import AttentionConfig
from moe.config.base import Section
from moe.config.cautions import cautions
from moe.config.guard import GuardConfig
from moe.config.lora import LoraConfig
from moe.config.model import ModelConfig, MoEConfig
from moe.config.rules import check_data, check_world
from moe.config.run import (
    BalanceConfig,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "AttentionConfig",
    "BalanceConfig",
    "CheckpointConfig",
    "DataConfig",
    "GuardConfig",
    "LoggingConfig",
    "LoraConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "TrainConfig",
    "cautions",
    "check_data",
    "check_world",
]
