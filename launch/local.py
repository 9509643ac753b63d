"""`turnout train`: a recipe -> a run folder, in this process or on ranks of this machine."""

import base64
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from launch import options, ranks
from launch.port import free_port
from moe import log, recipe
from moe.config import RunConfig
from moe.errors import EXIT_STOPPED, EXIT_USER_ERROR, LaunchError, clean_exit

EXIT_FAILED = 1


@click.command()
@options.recipe
@click.option(
    "--nproc", type=click.IntRange(min=1), help="Ranks to start on this machine by deepspeed's launcher."
)
def command(recipe_path: Path, overrides: tuple[str, ...], nproc: int | None) -> None:
    """Train RECIPE, or go on with its run folder if it was stopped.

    Without --nproc: one rank, in this process. For several machines start `-m moe.train RECIPE` with
    deepspeed, torchrun, accelerate or srun.

    Exit codes: 0 the run is complete; 75 stopped by a signal after saving, run the same command again;
    2 what was asked for cannot be done; 1 anything else.
    """
    log.setup()
    run = recipe.load(RunConfig, recipe_path, overrides)
    from moe import dist, train  # torch: only after the recipe has been found sound

    if nproc is None:
        with dist.end_of_rank(), clean_exit():
            sys.exit(train.main(recipe_path, overrides))
    train.preflight(run, nproc)
    sys.exit(_launch(run, [str(recipe_path), *overrides], nproc))


def _launch(run: RunConfig, arguments: Sequence[str], nproc: int) -> int:
    """Train on `nproc` ranks; the exit code of the command."""
    devices = _devices(nproc)
    before = _done(run)
    outcome = ranks.run(
        _launcher(devices, arguments), _environment(nproc, cpu=not _gpus()), _is_rank, _announce_stop
    )
    done = _done(run)
    if done is not None and (done != before or outcome.code == 0):
        return 0  # the record counts, not the code: a launcher can return 0 without an end
    if outcome.stops > 1:
        sys.stderr.write(f"error: ended at once; {run.folder} holds what was saved last.\n")
        return EXIT_FAILED
    if outcome.code in (EXIT_STOPPED, EXIT_USER_ERROR):
        return outcome.code  # the ranks have said it
    how = f"by {signal.Signals(-outcome.code).name}" if outcome.code < 0 else f"with code {outcome.code}"
    sys.stderr.write(
        f"error: the launcher ended {how} and {run.folder} is not done: what its ranks said stands above. "
        f"The same command goes on from the newest checkpoint.\n"
    )
    return EXIT_FAILED


def _launcher(devices: Sequence[str | int], arguments: Sequence[str]) -> list[str]:
    """The part of deepspeed's launcher that works on one node.

    Its front end, `deepspeed`, picks up /job/hostfile unasked, turns CUDA_VISIBLE_DEVICES into 0..N-1, and
    leaves the ranks behind when it gets a signal.
    """
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(devices)}).encode()).decode()
    return [
        *(sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}"),
        *(
            "--master_addr=127.0.0.1",
            f"--master_port={free_port('127.0.0.1')}",
            "--no_local_rank",
            "--log_level=critical",
        ),
        *("--module", "moe.train", *arguments),
    ]


def _is_rank(command_line: Sequence[str]) -> bool:
    return list(command_line[1:4]) == ["-u", "-m", "moe.train"]


def _environment(nproc: int, *, cpu: bool) -> dict[str, str]:
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // nproc)))
    if cpu:
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def _devices(nproc: int) -> list[str | int]:
    """What each rank gets; raises `LaunchError` if there are fewer GPUs than ranks."""
    gpus = _gpus()
    if not gpus:
        return list(range(nproc))
    if nproc > len(gpus):
        raise LaunchError(
            f"--nproc is {nproc}, but {len(gpus)} GPUs are visible: a rank needs one of its own. "
            f"Use --nproc {len(gpus)} or less, or hide them to train on the CPU: CUDA_VISIBLE_DEVICES= ."
        )
    return gpus[:nproc]


def _gpus() -> list[str | int]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names: list[str | int] = [*visible.split(",")] if visible else [*range(count)]
    return names[:count]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _done(run: RunConfig) -> tuple[int, int] | None:
    """A mark of the run's `done` record that changes when it is written anew."""
    try:
        status = (run.folder / "done").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _announce_stop() -> None:
    log.get().info("stopping: the ranks finish their step and save; a second signal ends them at once")
