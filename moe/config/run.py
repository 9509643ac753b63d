"""A whole run: model, data, training, layout, balance, checkpoints, logging."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, model_validator

from moe.config.base import Count, PathText, Section, Size
from moe.config.guard import GuardConfig
from moe.config.lora import LoraConfig
from moe.config.mixture import MixtureConfig
from moe.config.model import Fraction, ModelConfig, Precision

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


def _whole(value: Any) -> Any:
    """Literal compares equal: it takes 1.0 and true for 1."""
    if isinstance(value, bool | float):
        raise ValueError("it must be 0, 1, 2 or 3, without a fraction")
    return value


ZeroStage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(_whole)]


class DataConfig(Section):
    path: PathText
    """Folder made by `turnout prepare`: shards, manifest, tokenizer."""
    mixture: MixtureConfig | None = None
    """What to train on instead of that folder's training split; null: that. Tokenizer and validation stay its own."""
    sequence_length: Size
    """Tokens in a training sequence."""
    verify_hashes: bool = True
    """Hash every shard against the manifest before training starts."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents fill sequences: end to end, cut wherever one ends (a conversation has a sequence to itself), or so
    that none is cut that fits (arXiv:2404.10830)."""
    attend_across_documents: bool = True
    """See, and predict, the next document from those before it in the sequence; false: each is on its own, with
    positions from 0."""


class OptimizerConfig(Section):
    kind: Literal["adamw", "muon"] = "adamw"
    """adamw (arXiv:1711.05101) for all weights, or muon (arXiv:2502.16982) for the matrices of hidden layers, each
    expert's on their own, and adamw for embeddings, head, norms and biases."""
    learning_rate: PositiveFloat
    """Peak learning rate; Muon's steps are scaled to AdamW's size, so one rate serves both."""
    momentum: Beta = 0.95
    """Decay of Muon's momentum; muon only."""
    beta1: Beta = 0.9
    """Decay of AdamW's first moment."""
    beta2: Beta = 0.95
    """Decay of AdamW's second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; norms and biases are never decayed."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global gradient norm, measured before any momentum; 0 leaves gradients as they are. Muon's steps have
    their size whatever the norm: there it limits how much one batch turns them."""


class ScheduleConfig(Section):
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: a cosine, a plateau with a linear decay at the end, or a plateau."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from zero."""
    decay_steps: Size | None = None
    """Steps of the final linear decay; wsd only."""
    final_fraction: Annotated[float, Fraction] = 0.1
    """Learning rate at the last step, as a share of the peak; cosine and wsd."""


class TrainConfig(Section):
    steps: Size
    """Optimizer steps in the run."""
    global_batch_size: Size
    """Sequences per optimizer step over all ranks; the same for every layout."""
    micro_batch_size: Size
    """Sequences per forward pass on one rank; the rest of the batch is accumulated."""
    precision: Precision = "bf16"
    """bf16 keeps float32 master weights; fp32 computes in float32."""
    activation_recomputation: Literal["none", "experts", "block"] = "none"
    """What backward computes again: the experts' pre-activations (arXiv:2512.14080), or all but a layer's input."""
    prediction_loss_weight: NonNegativeFloat = 0.3
    """Weight of the mean loss of the prediction modules (arXiv:2412.19437, section 2.2; there 0.3, later 0.1)."""
    evaluate_every: Size | None = None
    """Steps between evaluations on the validation split; null: none during training."""
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    guard: GuardConfig = GuardConfig()


class ParallelConfig(Section):
    expert_parallel_size: Size = 1
    """Ranks that share the experts of a layer; consecutive ranks form a group."""
    sequence_parallel_size: Size = 1
    """Ranks that share each sequence, every one with a part of its positions; around attention they exchange them for
    heads (Ulysses, arXiv:2309.14509). Consecutive ranks form a group."""
    dispatch: Literal["all_to_all", "deepep"] = "all_to_all"
    """How tokens travel to their experts: torch's all-to-all, or DeepEP's kernels where they are installed."""
    zero_stage: ZeroStage = 1
    """What DeepSpeed ZeRO partitions: nothing, optimizer states, gradients too, parameters too (arXiv:1910.02054)."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in host memory and is stepped there: nothing, the optimizer (arXiv:2101.06840; ZeRO 1 to 3), or
    parameters too (arXiv:2104.07857; ZeRO 3)."""
    timeout_minutes: Annotated[float, Field(ge=0.1, le=10_080)] = 10.0
    """How long a collective may wait before the run fails."""


class BalanceConfig(Section):
    """Policies that keep experts busy, for each sparse layer on its own; several may act at once."""

    sequence_loss_weight: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss within each sequence (arXiv:2405.04434, eq. 12); 0: none."""
    micro_batch_loss_weight: NonNegativeFloat = 0.0
    """The same within each rank's micro-batch (arXiv:2101.03961, eq. 4); depends on the layout."""
    global_batch_loss_weight: NonNegativeFloat = 0.0
    """The same over the global batch (arXiv:2501.11873, eq. 4)."""
    router_z_loss_weight: NonNegativeFloat = 0.001
    """Weight of the router z-loss (arXiv:2202.08906, eq. 5); 0: none."""
    bias_update_rate: NonNegativeFloat = 0.0
    """How far an expert's selection bias moves against its load at each step (arXiv:2408.15664, alg. 1)."""
    bias_update: Literal["sign", "proportional"] = "sign"
    """Move by the rate, or by the rate times the relative violation."""
    router_jitter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """While training, multiply what routers see by uniform noise in 1 +- this (arXiv:2101.03961, section 2.2)."""
    capacity_factor: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """Rows an expert accepts from a rank's micro-batch, over the mean; what is beyond is dropped. Null: no limit."""
    drop_by: Literal["score", "position"] = "score"
    """Which rows an over-full expert drops: the lowest weights, or the last tokens."""


class CheckpointConfig(Section):
    every_steps: Size | None = None
    """Steps between checkpoints; null: only at the end and when stopped."""
    keep: Size | None = None
    """Newest checkpoints to keep; null: all."""
    keep_every: Size | None = None
    """Keep those of every such number of steps for good, beside the newest; with keep only."""
    asynchronous: bool = True
    """Go on training from a copy's being taken, while a thread writes it; false: wait until it is written."""


class LoggingConfig(Section):
    every_steps: Size = 1
    """Steps between records in metrics.jsonl and on the screen."""
    tensorboard: bool = False
    """Write TensorBoard events to logs/tensorboard too."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of one rank for the MFU; null: the device's data sheet, or a matmul measured at start."""


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=255)]
    """The run's name: letters, digits, dot, dash, underscore."""
    run_dir: PathText | None = None
    """The run's folder; null: runs/NAME."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initialisation and data order."""
    init_from: PathText | None = None
    """Folder whose weights the run begins with: a Hugging Face folder, one that `turnout import` made, or a run's,
    whose newest checkpoint counts; null: weights are drawn from the seed."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    balance: BalanceConfig = BalanceConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    lora: LoraConfig | None = None
    """Train low-rank adapters on a frozen model; null: train all weights."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further DeepSpeed settings, passed through as they are after a check of names and values."""

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return Path(f"runs/{self.name}" if self.run_dir is None else self.run_dir)

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        from moe.config import rules  # the rules read RunConfig, so they load after it

        rules.check(self)
        return self
