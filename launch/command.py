"""`turnout launch`: a recipe and a place -> a plan in the run folder, checked, and started or submitted."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import click

from launch import hosts as host_names
from launch import options, slurm, start
from launch.container import Container
from launch.folder import Attempt, Kind, LaunchFolder, Limits, Plan, write_text
from launch.submit import submit
from moe import log, recipe
from moe.config import RunConfig
from moe.errors import LaunchError

_FORWARDED = re.compile(
    r"(PYTHON|OMP_|MKL_|GLOO_|NCCL_|FI_|UCX_|TORCH|HF_|TOKENIZERS_|DS_|TRITON_|PYTORCH_|TMPDIR$|CUDA_VISIBLE_DEVICES$"
    r"|CUDA_HOME$|LD_LIBRARY_PATH$|PATH$|VIRTUAL_ENV$|TURNOUT_)"
)
_NOT_FORWARDED = ("TURNOUT_OWNER", "TURNOUT_BEAT", "TURNOUT_STACKS")


@click.command()
@options.recipe
@click.option("--on", "kind", type=click.Choice(get_args(Kind)), default="local", show_default=True)
@click.option("--nodes", type=click.IntRange(min=1), help="Nodes that train. For hosts: all that are named.")
@click.option(
    "--min-nodes",
    type=click.IntRange(min=1),
    help="Hosts, Slurm: as few will do, with the same batch, when there are no more.",
)
@click.option("--gpus-per-node", type=click.IntRange(min=1), help="A rank on each.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), help="Where there are no GPUs.")
@click.option("--cpus-per-rank", type=click.IntRange(min=1), help="Slurm: cores to ask for, by rank.")
@click.option("--spares", type=click.IntRange(min=0), default=0, help="Slurm: nodes kept for one that dies.")
@click.option("--hosts", "given_hosts", help="A hostfile (`HOST slots=N` lines) or names: a,b,c.")
@click.option(
    "--ssh", "plain_ssh", is_flag=True, help="Hosts: agents by ssh, not by deepspeed's launcher and pdsh."
)
@options.place
@click.option("--time", "time_limit", help="D-HH:MM:SS, HH:MM:SS or minutes.")
@click.option("--module", "modules", multiple=True, help="To be loaded in the job; may be given again.")
@options.container
@click.option(
    "--signal-before",
    type=click.IntRange(10, 65535),
    default=300,
    show_default=True,
    help="Slurm: seconds before the time limit to save and requeue.",
)
@options.limits
@click.option("--dry-run", is_flag=True, help="Check, show what would be started, and start nothing.")
def command(
    recipe_path: Path,
    overrides: tuple[str, ...],
    kind: Kind,
    nodes: int | None,
    min_nodes: int | None,
    gpus_per_node: int | None,
    ranks_per_node: int | None,
    cpus_per_rank: int | None,
    spares: int,
    given_hosts: str | None,
    plain_ssh: bool,
    place: slurm.Place,
    time_limit: str | None,
    modules: tuple[str, ...],
    container: Container | None,
    signal_before: int,
    limits: Limits,
    dry_run: bool,
) -> None:
    """Train RECIPE on this machine, on hosts over ssh, or through Slurm, and see it through.

    Everything is checked first. One agent a node starts the ranks and watches them; what fails is started again
    from the newest checkpoint. The plan, the script and the attempts lie in the run's folder under launch/.

    Exit codes: 0 the run is complete (for Slurm: submitted); 75 stopped after saving; 2 cannot be done; 1 failed.
    """
    log.setup()
    run = recipe.load(RunConfig, recipe_path, overrides)
    _only_with(kind, "slurm", {
        **{f"--{name}": value for name, value in place.options.items()}, "--time": time_limit,
        "--module": modules, "--spares": spares, "--cpus-per-rank": cpus_per_rank,
        "--container": container,
    })  # fmt: skip
    _only_with(kind, "hosts", {"--hosts": given_hosts, "--ssh": plain_ssh})
    names: tuple[str, ...] = ()
    if kind == "hosts":
        if given_hosts is None:
            raise LaunchError("--on hosts needs to know them: give --hosts HOSTFILE or --hosts a,b,c.")
        names, slots = host_names.read(given_hosts)
        if gpus_per_node is None and ranks_per_node is None:
            ranks_per_node = slots
    per_node, number = _per_node(gpus_per_node, ranks_per_node), nodes or max(1, len(names))
    if kind == "local" and number > 1:
        raise LaunchError(
            f"--nodes is {number}, but --on local is this machine alone. Use --on hosts or slurm."
        )
    if kind == "hosts" and number > len(names):
        raise LaunchError(f"--nodes is {number}, but --hosts names {len(names)}. Name more, or use fewer.")
    plan = Plan(
        kind=kind,
        run_folder=str(run.folder.absolute()),
        working_folder=str(Path.cwd()),
        python=sys.executable,
        num_nodes=number,
        ranks_per_node=per_node,
        hosts=names,
        pdsh=kind == "hosts" and not plain_ssh,
        cpus_per_rank=cpus_per_rank,
        environment=_forwarded(os.environ),
        min_nodes=min_nodes,
        container=container,
        limits=limits,
    )
    if time_limit is not None:
        slurm.check_time(time_limit, signal_before)
    request = slurm.Request(
        name=run.name,
        gpus_per_node=gpus_per_node or 0,
        time=time_limit,
        place=place,
        spares=spares,
        signal_seconds=signal_before,
        modules=modules,
    )
    from launch.layout import refit  # torch: only after the recipe has been found sound
    from moe import train

    train.preflight(run, plan.world_size, elsewhere=kind != "local")
    if min_nodes is not None:
        _check_fewest(plan, refit(recipe_path, min_nodes * per_node, overrides))
    folder = LaunchFolder(Path(plan.run_folder))
    script = slurm.script(folder, plan, request, _exports(plan)) if kind == "slurm" else None
    if dry_run:
        click.echo(script if script is not None else _by_hand(folder, plan))
        return
    sys.exit(_launch(run, folder, plan, script))


def _launch(run: RunConfig, folder: LaunchFolder, plan: Plan, script: str | None) -> int:
    _refuse_if_alive(folder)
    folder.home.mkdir(parents=True, exist_ok=True)
    (folder.run / "logs").mkdir(exist_ok=True)
    folder.stop.unlink(missing_ok=True)
    if plan.kind == "hosts":
        host_names.check(plan, folder)
    write_text(folder.recipe, recipe.dump(run))
    folder.write_plan(replace(plan, first_attempt=len(folder.attempts()) + 1))
    (folder.home / "job.json").unlink(missing_ok=True)
    if script is not None:
        write_text(folder.home / "job.sbatch", script)
        click.echo(f"job {submit(folder)} is submitted; its script is {folder.home / 'job.sbatch'}")
        click.echo(f"look: turnout status {folder.run}, turnout logs {folder.run}, turnout stop {folder.run}")
        return 0
    from launch.supervise import supervise

    return supervise(folder.run)


def _refuse_if_alive(folder: LaunchFolder) -> None:
    from launch.look import alive

    if (what := alive(folder)) is not None:
        raise LaunchError(
            f"{folder.run} is being trained: {what}. Wait for its end, or end it by `turnout stop {folder.run}`."
        )


def _per_node(gpus_per_node: int | None, ranks_per_node: int | None) -> int:
    if gpus_per_node is not None and ranks_per_node is not None:
        raise LaunchError(
            f"--gpus-per-node is {gpus_per_node} and --ranks-per-node {ranks_per_node}, but a rank has one GPU or "
            f"none. Give one of them."
        )
    return gpus_per_node or ranks_per_node or 1


def _check_fewest(plan: Plan, changes: tuple[str, ...] | None) -> None:
    if plan.kind == "local":
        raise LaunchError("--min-nodes is given, but --on local is this machine alone. Leave it out.")
    if plan.min_nodes is not None and plan.min_nodes > plan.num_nodes:
        raise LaunchError(
            f"--min-nodes is {plan.min_nodes}, but --nodes is {plan.num_nodes}. Use at most as many."
        )
    if changes is None:
        raise LaunchError(
            f"--min-nodes is {plan.min_nodes}, but no smaller micro-batch or group of experts fits the recipe's batch "
            f"to {plan.min_nodes} x {plan.ranks_per_node} ranks. Use another --min-nodes or train.global_batch_size."
        )


def _only_with(kind: Kind, right: Kind, options: Mapping[str, object]) -> None:
    wrong = [name for name, value in options.items() if value]
    if wrong and kind != right:
        raise LaunchError(
            f"{', '.join(wrong)} means something with --on {right} alone, but --on is {kind}. Leave it out."
        )


def _forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """What ranks on other machines need of this one's variables, and no secrets."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if _FORWARDED.match(name) and name not in _NOT_FORWARDED and not re.search("TOKEN$|KEY$|SECRET", name)
    }


def _exports(plan: Plan) -> dict[str, str]:
    """For the batch script, which needs to find Python and us; the rest is in the plan."""
    return {name: value for name, value in plan.environment.items() if name in ("PATH", "PYTHONPATH")}


def _by_hand(folder: LaunchFolder, plan: Plan) -> str:
    attempt = Attempt(1, "", plan.hosts[: plan.num_nodes] or ("127.0.0.1",), 0.0, 0)
    lines = [shlex.join(line) for line in start.commands(folder, plan, attempt)]
    page = (
        "" if not plan.pdsh else f"{folder.home}/hostfile:\n{start.hostfile(attempt, plan.ranks_per_node)}\n"
    )
    supervisor = shlex.join([plan.python, "-m", "launch.supervise", str(folder.run)])
    return "\n".join([f"{page}{supervisor}", "which starts in every attempt:", *lines])
