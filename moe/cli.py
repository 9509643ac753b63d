"""`turnout VERB ...` -> the entry point of that verb, imported only when it is called."""

import json
from importlib import import_module
from importlib.metadata import version

import click

from moe.errors import clean_exit

VERBS = {
    "prepare": ("data_prep.run:command", "Turn text into token shards, a tokenizer and a manifest."),
    "train": ("launch.local:command", "Train a recipe, or go on with a run that was stopped."),
    "evaluate": (
        "moe.evaluate:command",
        "Measure held-out loss and bits per byte of a run, or tasks of lm-eval.",
    ),
    "data": ("data_prep.verbs:command", "Inspect, verify, measure or sample a prepared data folder."),
    "import": ("moe.ingest:command", "Bring a Hugging Face checkpoint in, to train on from it."),
    "export": ("moe.export:command", "Write a run as a Hugging Face checkpoint."),
    "upcycle": ("moe.upcycle:command", "Make a sparse model of a dense Hugging Face checkpoint."),
    "generate": ("moe.generate:command", "Continue a prompt with a run or an export."),
    "launch": (
        "launch.command:command",
        "Train a recipe on this machine, on hosts or through Slurm, and see it through.",
    ),
    "status": ("launch.look:status", "Say whether a launched run trains, and how far it is."),
    "logs": ("launch.look:logs", "Print what a rank of a launched run said."),
    "stop": ("launch.look:stop", "Let a launched run save and end."),
    "requeue": ("launch.submit:requeue", "Put a launched run back into Slurm's queue, saved."),
    "explain": ("launch.look:explain", "Say what happened to a launched run, and why."),
    "doctor": ("launch.doctor:command", "Look at hosts before a long run, and say which to leave out."),
    "testbed": ("launch.testbed.command:command", "Start a small cluster of namespaces on this box."),
    "checkpoint": ("moe.checkpoints:command", "List, verify, prune or resize the checkpoints of a run."),
    "certify": ("moe.certify.command:command", "Prove that a recipe trains the same in any layout."),
    "report": ("moe.report:command", "Draw loss and expert load of a run."),
    "schema": ("moe.cli:schema", "Print the JSON schema of recipes, for editors."),
    "demo": ("launch.demo:command", "Do all of the above once, small, and print a table."),
}


class Verbs(click.Group):
    """A group that knows its verbs by name and imports one when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, attribute = VERBS[cmd_name][0].partition(":")
        found: click.Command = getattr(import_module(module), attribute)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in VERBS and not args[0].startswith("-"):
            ctx.fail(_no_such_verb(args[0]))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, help_line) for verb, (_, help_line) in VERBS.items()])


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"turnout {version('turnout')}")
        ctx.exit()


@click.command(cls=Verbs, subcommand_metavar="VERB [ARGS]...", context_settings={"max_content_width": 110})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def turnout() -> None:
    """Train sparse mixture-of-experts Transformers on DeepSpeed, from text to a Hugging Face checkpoint."""


@click.command()
@click.option("--data", is_flag=True, help="The schema of data recipes (configs/data) instead.")
def schema(data: bool) -> None:
    """Print the JSON schema of run recipes, so that an editor completes and checks them."""
    module, name = ("data_prep.recipe", "DataRecipe") if data else ("moe.config", "RunConfig")
    section = getattr(import_module(module), name)
    click.echo(json.dumps(section.model_json_schema(), indent=2))


def main() -> None:
    """The console script: one clean message and exit code 2 for what the user can mend."""
    with clean_exit():
        turnout(prog_name="turnout")


def _no_such_verb(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, VERBS, n=1)
    way_out = f"Did you mean {close[0]!r}?" if close else f"Use one of {', '.join(VERBS)}."
    return f"there is no verb {name!r}. {way_out}"


if __name__ == "__main__":
    main()
