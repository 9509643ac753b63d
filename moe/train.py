"""Recipe -> trained run folder; the same module under deepspeed, torchrun, accelerate, srun and plain python."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe import attempt, dist, log
from moe.checkpoint import identity, space
from moe.checkpoint.certificate import CERTIFICATE
from moe.checkpoint.folder import write_atomically
from moe.checkpoint.lock import held
from moe.config import RunConfig, cautions, check_data, check_world
from moe.data.shards import TokenData
from moe.engine import ds_config
from moe.errors import EXIT_STOPPED, ConfigError, ExportError, TurnoutError, clean_exit
from moe.hf import beginning
from moe.hf.match import check_exportable
from moe.recipe import dump, load
from moe.stop import StopSignal

if TYPE_CHECKING:
    from moe.checkpoint.save import TrainState
    from moe.data.sources import Sources
    from moe.engine.engine import Engine
    from moe.metrics import Meter, Tracker


def preflight(run: RunConfig, world_size: int, *, elsewhere: bool = False) -> TokenData:
    """All that can be refused before a process starts: layout, data, run folder. Loads no DeepSpeed.

    `elsewhere`: ranks will be on other machines, and look there for what must be installed.

    Raises `ConfigError`, `DataError` or `CheckpointError`.
    """
    check_world(run, world_size)
    ds_config.check(run.deepspeed, run.parallel.zero_stage)
    if run.parallel.dispatch == "deepep" and not elsewhere:
        from moe.sparse import deepep

        deepep.check_installed()
    data = TokenData.open(Path(run.data.path), verify=False)
    check_data(run, data)
    if run.folder.exists() and not run.folder.is_dir():
        raise ConfigError(f"run_dir is {run.folder}, but that is a file. Choose another run_dir.")
    there = {path.name for path in run.folder.iterdir()} if run.folder.is_dir() else set()
    if there - {".lock", CERTIFICATE, "launch", "logs"} and "recipe.yaml" not in there:
        raise ConfigError(
            f"run_dir is {run.folder}, but that folder holds other things than a run (there is no recipe.yaml). "
            f"Choose another run_dir."
        )
    manifest = identity.check(run, _sources(run, data).fingerprint)
    space.check(run, manifest)
    if manifest is None and run.init_from is not None:  # else the checkpoint is what counts
        beginning.check_tokenizer(data.tokenizer_folder, run.init_from)
        beginning.begin(run)
    return data


def main(recipe: str | Path, overrides: Sequence[str] = ()) -> int:
    """Train, or go on training, the recipe's run on the ranks that the launcher announced.

    Returns 0 when all steps are done, `EXIT_STOPPED` after a signal and a save; raises `TurnoutError`.
    """
    stop = StopSignal.listen()
    attempt.show_stacks_on_request()
    log.setup(dist.rank_from_environment())
    run = load(RunConfig, recipe, overrides)
    data = preflight(run, dist.world_size_from_environment())
    with dist.start(run.parallel) as ranks:
        return train(run, data, ranks, stop)


def train(run: RunConfig, data: TokenData, ranks: dist.Ranks, stop: StopSignal) -> int:
    """The loop. Collective."""
    from moe.advance import advance
    from moe.checkpoint.resume import restore
    from moe.checkpoint.save import Saver
    from moe.engine.build import build
    from moe.engine.engine import Engine
    from moe.metrics import Meter, Tracker

    sources = _sources(run, data)
    goes_on = identity.check(run, sources.fingerprint) is not None
    _on_the_first_rank(ranks, lambda: _verify_inputs(run, goes_on))
    weights = None if goes_on else beginning.begin(run)
    engine = Engine.start(run, build(run, ranks, weights), ranks)
    state = restore(engine, sources.fingerprint)
    # Only now is it sure that this run may write there.
    lock = ExitStack()
    _on_the_first_rank(ranks, lambda: _take_folder(run, data, state, lock))
    _announce(run, sources, ranks, state)
    batches = sources.batches(
        run.data,
        global_batch_size=run.train.global_batch_size,
        micro_batch_size=run.train.micro_batch_size,
        rank=ranks.data_rank,
        world_size=ranks.data_world_size,
        positions=ranks.positions(run.data.sequence_length),
        seed=run.seed,
        start_step=state.step,
    )
    with (
        lock,
        Tracker.open(run, speaks=ranks.speaks, step=state.step) as tracker,
        Saver.open(engine, sources.fingerprint, state.step, tracker) as saver,
    ):
        meter = Meter(run, ranks, tracker)
        beat = attempt.beats(state.step)
        if state.step == 0:
            _evaluate(run, data, engine, tracker, state, meter)
        while state.step < run.train.steps and not ranks.any(stop.received or saver.poll()):
            observe = meter.due(state.step + 1)
            with meter.waiting():
                here = _next(batches)
            result = engine.step(here, state.step, observe=observe, guard=state.guard)
            if result.fault:
                saver.settle()  # if the run is rolled back, then to the newest checkpoint at every try
            state = advance(engine, state, result, meter)
            beat(state.step)
            _evaluate(run, data, engine, tracker, state, meter)
            if run.checkpoint.every_steps and state.step % run.checkpoint.every_steps == 0:
                with meter.stopped():
                    saver.save(state)
        saver.finish(state)
        return _finish(run, ranks, state)  # the folder is still ours


def _sources(run: RunConfig, data: TokenData, *, verify: bool = False) -> "Sources":
    from moe.data.sources import open_sources

    batch, steps = run.train.global_batch_size, run.train.steps
    return open_sources(run.data, data, global_batch_size=batch, steps=steps, seed=run.seed, verify=verify)


def _next(batches: Iterator[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The next step's batches; what is wrong with them is news of this rank alone."""
    try:
        return next(batches)
    except TurnoutError as error:
        error.local = True
        raise


def _evaluate(
    run: RunConfig,
    data: TokenData,
    engine: "Engine",
    tracker: "Tracker | None",
    state: "TrainState",
    meter: "Meter",
) -> None:
    every = run.train.evaluate_every
    if not every or (state.step % every and state.step != run.train.steps):
        return
    from moe.data.loader import validation_batches

    with meter.stopped():
        batches = validation_batches(
            data,
            sequence_length=run.data.sequence_length,
            batch_size=run.train.micro_batch_size,
            rank=engine.ranks.data_rank,
            world_size=engine.ranks.data_world_size,
            positions=engine.ranks.positions(run.data.sequence_length),
            packing=run.data.packing,
            attend_across_documents=run.data.attend_across_documents,
        )
        nats, tokens = (float(total) for total in engine.evaluate(batches))
        if tracker is not None:
            tracker.evaluation(
                {
                    "step": state.step,
                    "validation_loss": nats / tokens,
                    "bits_per_byte": nats / (data.num_bytes("validation") * math.log(2)),
                }
            )


def _on_the_first_rank(ranks: dist.Ranks, work: Callable[[], None]) -> None:
    """Do `work` on rank 0; what goes wrong there is an error on every rank, so that none is left waiting."""
    fault: TurnoutError | None = None
    if ranks.speaks:
        try:
            work()
        except TurnoutError as error:
            fault = error
    fault = ranks.gather(fault)[0]
    if fault is not None:
        raise fault


def _verify_inputs(run: RunConfig, goes_on: bool) -> None:
    """Hash what is read: shards, and the checkpoint that the run begins with."""
    if run.data.verify_hashes:
        _sources(run, TokenData.open(Path(run.data.path), verify=True), verify=True)
    if not goes_on:
        beginning.begin(run, verify=True)


def _take_folder(run: RunConfig, data: TokenData, state: "TrainState", lock: ExitStack) -> None:
    """Lock the run's folder; write the resolved recipe and, for a run from the beginning, the tokenizer."""
    metrics, tokenizer = run.folder / "metrics.jsonl", run.folder / "tokenizer"
    try:
        lock.enter_context(held(run.folder))
        if metrics.is_dir():
            raise ConfigError(
                f"{metrics} is a folder, but records go into a file of that name. Move it away."
            )
        write_atomically(run.folder / "recipe.yaml", dump(run))
        (run.folder / "done").unlink(missing_ok=True)
        if state.step == 0 or not tokenizer.is_dir():
            partial = run.folder / ".tokenizer"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(data.tokenizer_folder, partial)
            shutil.rmtree(tokenizer, ignore_errors=True)
            partial.rename(tokenizer)
    except OSError as error:
        raise ConfigError(
            f"run_dir is {run.folder}, which cannot be written ({error.strerror or error}). Choose another run_dir."
        ) from None


def _announce(run: RunConfig, sources: "Sources", ranks: dist.Ranks, state: "TrainState") -> None:
    if not ranks.speaks:
        return
    from moe.model import count, kept_sentence, lora

    say = log.get().info
    sharing, zero = run.parallel.sequence_parallel_size, run.parallel.zero_stage
    accumulation = check_world(run, ranks.world_size)
    try:
        check_exportable(run.model)
    except ExportError as error:
        log.get().warning("this model cannot be exported: %s", error)
    for caution in cautions(run.model):
        log.get().warning(caution)
    say("%s: %s", run.name, count(run.model, run.data.sequence_length).sentence())
    if run.lora is not None:
        total = count(run.model, run.data.sequence_length).total_parameters
        say("%s", lora.sentence(lora.trained(run.model, run.lora), total))
    if kept := kept_sentence(run):
        say("%s", kept)
    say(
        "%d ranks on %s, EP %d, SP %d, ZeRO %d, %s, %d sequences of %d tokens a step in %d micro-batches a rank",
        ranks.world_size,
        ranks.device.type,
        run.parallel.expert_parallel_size,
        sharing,
        zero,
        run.train.precision,
        run.train.global_batch_size,
        run.data.sequence_length,
        accumulation,
    )
    for use in sources.uses:
        say("%s", use.sentence())
    if state.step:
        say("going on from step %d of %d", state.step, run.train.steps)
    elif run.init_from is not None:
        say("beginning with the weights of %s", run.init_from)


def _finish(run: RunConfig, ranks: dist.Ranks, state: "TrainState") -> int:
    done = state.step >= run.train.steps
    if ranks.speaks:
        if done:
            attempt.check_owner(run.folder)
            page = {"step": state.step, "tokens": state.tokens}
            write_atomically(run.folder / "done", json.dumps(page) + "\n")
            log.get().info("done: %d steps, %s tokens, in %s", state.step, f"{state.tokens:,}", run.folder)
        else:
            sentence = "stopped at step %d of %d; the same command goes on from here"
            log.get().info(sentence, state.step, run.train.steps)
    ranks.barrier()
    return 0 if done else EXIT_STOPPED


@click.command("train")
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option(
    "--local_rank", "--local-rank", type=int, hidden=True, help="Given by launchers; the environment counts."
)
def command(recipe: str, overrides: tuple[str, ...], local_rank: int | None) -> None:
    """Train RECIPE, with key=value OVERRIDES, as one of the ranks that a launcher started."""
    with clean_exit(speak=dist.rank_from_environment() == 0):
        raise SystemExit(main(recipe, overrides))


if __name__ == "__main__":
    dist.end_of_rank()(command)()
