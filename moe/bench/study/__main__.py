"""`python -m moe.bench.study PLAN`: train and evaluate what the plan says, go on where it stopped, print tables."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import click

from moe import log
from moe.errors import ConfigError, clean_exit


@click.command("study")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--list", "only_list", is_flag=True, help="Say which runs the sweep begins with, and train nothing."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write results here too.")
@click.option("--png", type=click.Path(path_type=Path), help="Draw the picture here too.")
def command(plan: Path, only_list: bool, json_path: Path | None, png: Path | None) -> None:
    """Train models of equal cost and balancing policies side by side, as PLAN says.

    Runs one after another, each by `turnout train` and `turnout evaluate` in processes of their own. Finished
    runs are not made again: the same command goes on after an interruption. Set OMP_NUM_THREADS to leave cores
    to others. Results go to results.json, tables.md and study.png in the study's folder.
    """
    log.setup()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with clean_exit():
        from moe.bench.study.plan import Jobs, StudyPlan
        from moe.recipe import load

        jobs = Jobs(load(StudyPlan, plan), plan.parent)
        jobs.check()
        if only_list:
            for model in jobs.plan.models:
                for job in jobs.sweep(model):
                    click.echo(job.label)
            click.echo(f"{jobs.number()} runs in all")
            return
        for option, path in (("--json", json_path), ("--png", png)):
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(
                    f"{option} is {path}, but its folder does not exist. Make it, or choose another."
                )
        page = _study(jobs)
        _write(page, jobs.plan.folder, json_path, png)


def _study(jobs: Any) -> dict[str, Any]:
    from moe.bench.study.runner import Runner
    from moe.bench.study.steps import carry_out, circumstances

    with Runner(jobs) as runner:
        runner.prepare()
        results = carry_out(jobs, runner.execute)
    return {**circumstances(jobs), "results": results.page()}


def _write(page: dict[str, Any], folder: Path, json_path: Path | None, png: Path | None) -> None:
    from moe.bench.study.picture import draw
    from moe.bench.study.tables import markdown

    text = markdown(page)
    for path in filter(None, (folder / "results.json", json_path)):
        path.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    for path in filter(None, (folder / "study.png", png)):
        draw(page, path)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    click.echo(text)
    click.echo(f"results: {folder / 'results.json'}, {folder / 'tables.md'}, {folder / 'study.png'}")


if __name__ == "__main__":
    command()
