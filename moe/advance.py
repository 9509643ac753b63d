"""A step's result -> the run's next state, on record: the step was taken, skipped, or one bad step too many."""

from dataclasses import replace

from moe.checkpoint import folder as folders
from moe.checkpoint import guarded
from moe.checkpoint.resume import load
from moe.checkpoint.save import TrainState
from moe.engine.engine import Engine
from moe.engine.result import StepResult
from moe.errors import TrainingError
from moe.metrics import Meter


def advance(engine: Engine, state: TrainState, result: StepResult, meter: Meter) -> TrainState:
    """The state after the step that gave `result`, and after what the guard does about it. Collective.

    Raises `TrainingError` if too many steps in a row were skipped and the run cannot or shall not be rolled back.
    """
    if not result.fault:
        state = state.after(result.num_tokens, result.tokens_per_expert, result.guard)
        unused, skipped = state.steps_since_use_LE, state.guard.skipped
        meter.step(result, step=state.step, tokens=state.tokens, unused=unused, skipped=skipped)
        return state
    state = state.passed_over(result.guard)
    in_a_row, skipped = state.guard.in_a_row, state.guard.skipped
    meter.skipped(result, result.fault, step=state.step, in_a_row=in_a_row, skipped=skipped)
    if in_a_row < engine.run.train.guard.max_in_a_row:
        return state
    good = _checkpoint_to_roll_back_to(engine, state, result.fault)
    with meter.stopped():
        state = _roll_back(engine, state, good)
    meter.rolled_back(good, step=state.step, skipped=state.guard.skipped, times=state.guard.roll_backs)
    return state


def _roll_back(engine: Engine, state: TrainState, good: int) -> TrainState:
    """The state of checkpoint `good`, as if all steps since then had been skipped.

    As PaLM was trained (arXiv:2204.02311, section 5.1): weights and moments go back, the position in the data and the
    learning rate go on, so that the batches before the bad steps and theirs are never seen again. To see them again
    would lead to where the run is now.
    """
    before = load(engine, folders.read_manifest(folders.step_folder(engine.run.folder, good)))
    guard = before.guard.rolled_back(state.step - good, state.guard.roll_backs + 1)
    return replace(before, step=state.step, guard=guard)


def _checkpoint_to_roll_back_to(engine: Engine, state: TrainState, fault: str) -> int:
    """Its step. Raises `TrainingError` if the run ends here."""
    run, guard = engine.run, engine.run.train.guard
    ending = (
        f"{state.guard.in_a_row} steps in a row were skipped, the last, step {state.step}, because {fault}: training "
        f"has diverged. Checkpoints are as they were."
    )
    if guard.then == "stop":
        raise TrainingError(
            f"{ending} Look at the data around these steps; or go on from the last checkpoint with "
            f"train.guard.then=roll_back, or a train.guard.max_in_a_row above {guard.max_in_a_row}.",
            state.step,
        )
    if state.guard.roll_backs >= guard.max_roll_backs:
        raise TrainingError(
            f"{ending} The run was rolled back as often as train.guard.max_roll_backs, {guard.max_roll_backs}, allows. "
            f"Start again with a lower train.optimizer.learning_rate (a new run_dir), or raise "
            f"train.guard.max_roll_backs.",
            state.step,
        )
    good = engine.ranks.gather(guarded.last_good(run.folder, state.step))[0]
    if good is None:
        raise TrainingError(
            f"{ending} There is no checkpoint yet to roll back to: checkpoint.every_steps is "
            f"{run.checkpoint.every_steps}. Set a smaller one, or start again with a longer "
            f"train.schedule.warmup_steps (a new run_dir).",
            state.step,
        )
    return good
