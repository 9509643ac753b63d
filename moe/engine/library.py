"""DeepSpeed, imported the one way that works on CPU and CUDA alike."""

import logging
import os
import warnings

import torch

if not torch.cuda.is_available():
    # Without this DeepSpeed guesses, and warns that it does.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops

# The shared-memory collective serves only inference, and compiling it takes minutes when ranks start.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# DeepSpeed 0.19.8 calls it by the name that torch 2.13 deprecates; nothing a user can do.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# It warns of every optimizer that is not on its list, so of our Muon; layouts are held to one process in tests/dist.
logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())
# Of a gradient that is not finite we say ourselves what becomes of it, and where.
logging.getLogger("DeepSpeed").addFilter(lambda record: "OVERFLOW! Skipping" not in record.getMessage())

__all__ = ["deepspeed"]
