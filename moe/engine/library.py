"""DeepSpeed, imported the one way that works on CPU and CUDA alike."""

import logging
import os
import warnings
from typing import Any

import torch

if not torch.cuda.is_available():
    # Without this DeepSpeed guesses, and warns that it does.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime import compiler
from deepspeed.runtime.constants import BFLOAT16
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

# The shared-memory collective serves only inference, and compiling it takes minutes when ranks start.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# A quarter of what a rank needs to start: to know its own Muon when it sees it, DeepSpeed 0.19.8 loads it, and with it
# the whole of torch's inductor to compile it. Ours is another one.
_compile, compiler.compile = compiler.compile, lambda: lambda function: function
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402

compiler.compile = _compile
# DeepSpeed 0.19.8 calls both by names that torch 2.13 deprecates; nothing a user can do.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*", category=FutureWarning)
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# It warns of every optimizer that is not on its list, so of our Muon; layouts are held to one process in tests/dist.
logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())
# Of a gradient that is not finite we say ourselves what becomes of it, and where.
logging.getLogger("DeepSpeed").addFilter(lambda record: "OVERFLOW! Skipping" not in record.getMessage())


def _chosen_wrapper(
    engine: Any, optimizer: Any, choose: Any = DeepSpeedEngine._do_optimizer_sanity_check
) -> Any:
    chosen = choose(engine, optimizer)
    return ZERO_OPTIMIZATION if chosen == BFLOAT16 and engine.zero_optimization() else chosen


# For ZeRO 1 with bf16 gradients added up in float32, and for that alone, DeepSpeed 0.19.8 takes another wrapper, with
# partitions of its own kind. The usual one, which ZeRO 2 has, does it as well.
DeepSpeedEngine._do_optimizer_sanity_check = _chosen_wrapper

__all__ = ["deepspeed"]
