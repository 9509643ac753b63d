"""`python -m moe.bench.study PLAN`: train and evaluate what the plan says, go on where it stopped, print tables."""

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe import log
from moe.errors import clean_exit

if TYPE_CHECKING:
    from moe.bench.study.plan import Jobs


@click.command("study")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--list", "only_list", is_flag=True, help="Check the plan, name its first runs, train nothing.")
def command(plan: Path, only_list: bool) -> None:
    """Train models of equal cost and balancing policies side by side, as PLAN says.

    Runs one after another, each by `turnout train` and `turnout evaluate` in processes of their own. Finished
    runs are not made again: the same command goes on after an interruption. Set OMP_NUM_THREADS to leave cores
    to others. In the study's folder: results.json, tables.md, study.png, and every run.
    """
    log.setup()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with clean_exit():
        from moe.bench.study.plan import Jobs, StudyPlan
        from moe.recipe import load

        jobs = Jobs(load(StudyPlan, plan), plan.parent)
        jobs.check()
        if only_list:
            for job in (job for model in jobs.plan.models for job in jobs.sweep(model)):
                click.echo(job.label)
            click.echo(f"{jobs.number()} runs in all")
        else:
            _study(jobs)


def _study(jobs: "Jobs") -> None:
    from moe.bench.study.picture import draw
    from moe.bench.study.runner import Runner
    from moe.bench.study.steps import carry_out, circumstances
    from moe.bench.study.tables import markdown

    with Runner(jobs) as runner:
        runner.prepare()
        results = carry_out(jobs, runner.execute)
    page = {**circumstances(jobs), "results": results.page()}
    folder, text = jobs.plan.folder, markdown(page)
    (folder / "results.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    (folder / "tables.md").write_text(text, encoding="utf-8")
    draw(page, folder / "study.png")
    click.echo(text)
    click.echo(f"results: {folder / 'results.json'}, {folder / 'tables.md'}, {folder / 'study.png'}")


if __name__ == "__main__":
    command()
