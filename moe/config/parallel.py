"""What the layout of a recipe must agree on with its model, precision and optimizer."""

from moe.config.numbers import choice, divisors
from moe.config.run import RunConfig


def parallel_faults(run: RunConfig) -> list[str]:
    """A line for each layout that cannot be, or that DeepSpeed does wrong."""
    parallel, moe, faults = run.parallel, run.model.moe, []
    ep = parallel.expert_parallel_size
    if moe is None and ep > 1:
        faults.append(
            f"parallel.expert_parallel_size is {ep}, but the model has no experts. Use 1, or add model.moe."
        )
    if moe is not None and moe.num_experts % ep:
        faults.append(
            f"parallel.expert_parallel_size is {ep}, but model.moe.num_experts is {moe.num_experts}: every rank "
            f"must hold the same number of experts. Use {choice(divisors(moe.num_experts))}."
        )
    if parallel.dispatch == "deepep":
        faults += _deepep(run)
    faults += _zero(run)
    if parallel.zero_stage == 0 and run.train.precision == "bf16":
        faults.append(
            "parallel.zero_stage is 0 with train.precision bf16: DeepSpeed then leaves experts out of the "
            "gradient norm and keeps no float32 master in step with the rest. Use zero_stage 1, or fp32."
        )
    return faults


def _zero(run: RunConfig) -> list[str]:
    """Stages and offload that cannot go together, or that DeepSpeed cannot do."""
    stage, offload, faults = run.parallel.zero_stage, run.parallel.offload, []
    if stage == 3 and run.train.optimizer.kind == "muon":
        faults.append(
            "parallel.zero_stage is 3 with train.optimizer.kind muon: stage 3 cuts every matrix into pieces, and Muon "
            "needs whole ones. Use zero_stage 2, or kind adamw."
        )
    if offload != "none" and stage == 0:
        faults.append(
            f"parallel.offload is {offload}, but parallel.zero_stage is 0: DeepSpeed offloads what it partitions, and "
            f"that is nothing. Use zero_stage 1, or offload none."
        )
    if offload == "all" and stage in (1, 2):
        faults.append(
            f"parallel.offload is all, but parallel.zero_stage is {stage}: only stage 3 can keep parameters elsewhere "
            f"while they are not used. Use zero_stage 3, or offload optimizer."
        )
    if offload != "none" and run.train.optimizer.kind == "muon":
        faults.append(
            f"parallel.offload is {offload} with train.optimizer.kind muon: its matrix products would run on the host. "
            f"Use kind adamw, or offload none."
        )
    return faults


def _deepep(run: RunConfig) -> list[str]:
    faults, moe = [], run.model.moe
    if run.parallel.expert_parallel_size == 1:
        faults.append(
            "parallel.dispatch is deepep, but parallel.expert_parallel_size is 1: no token travels, so it has no "
            "effect. Remove it, or set a parallel.expert_parallel_size of 2 or more."
        )
    if run.train.precision != "bf16":
        faults.append(
            f"parallel.dispatch is deepep, but train.precision is {run.train.precision}: DeepEP's kernels carry bf16. "
            f"Use train.precision=bf16, or parallel.dispatch=all_to_all."
        )
    width = (moe.latent_size if moe else None) or run.model.hidden_size
    if width % 8:
        faults.append(
            f"parallel.dispatch is deepep, but tokens travel {width} wide: DeepEP's kernels copy 16 bytes at a time, "
            f"so the width must be a multiple of 8. Use another width, or parallel.dispatch=all_to_all."
        )
    return faults
